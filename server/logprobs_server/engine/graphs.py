"""CUDA graphs of steps: one for each shape, captured when the shape returns, replayed from then on.

A step has about a thousand operations. Asked for one by one they cost the host many times what they cost the GPU.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from logprobs_server.engine.device_batch import Shape
from logprobs_server.engine.transfer import sent

__all__ = ["StepGraphs"]

_log = logging.getLogger(__name__)
_MOST_SHAPES = 128
"""Graphs kept, and shapes met once that are remembered; beyond them the one not met for longest goes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Captured:
    graph: torch.cuda.CUDAGraph
    numbers: Tensor
    result: Tensor


class StepGraphs:
    """Graphs of one function, in one pool of memory: none is replayed before the result of another was copied.

    run: takes numbers that are on the device and a shape; does the same work whatever the numbers are.
    """

    def __init__(self, run: Callable[[Tensor, Shape], Tensor], device: torch.device) -> None:
        self._run = run
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()
        self._met: OrderedDict[Shape, None] = OrderedDict()
        self._captured: OrderedDict[Shape, _Captured | None] = OrderedDict()  # None: it cannot be

    def replay(self, numbers: Sequence[int], shape: Shape) -> Tensor:
        """What `run` gives for these numbers. A new shape is run as it is: most of those never return."""
        given = torch.tensor(numbers).pin_memory()
        if shape in self._met:
            del self._met[shape]
            self._captured[shape] = self._capture(sent(given, self._device), shape)
            _trim(self._captured)
        captured = self._captured.get(shape)
        if captured is None:
            result = self._run(sent(given, self._device), shape)
            if shape not in self._captured:
                self._met[shape] = None
                _trim(self._met)
            return result
        self._captured.move_to_end(shape)
        captured.numbers.copy_(given, non_blocking=True)
        captured.graph.replay()
        return captured.result.clone()

    def _capture(self, numbers: Tensor, shape: Shape) -> _Captured | None:
        """Records what was run once before, so that libraries have made what they need; None where that fails."""
        graph = torch.cuda.CUDAGraph()
        try:
            with (
                torch.cuda.device(self._device),
                torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"),
            ):
                result = self._run(numbers, shape)
        except RuntimeError as error:
            _log.warning("steps of %s are run without a graph: %s", shape, error)
            return None
        return _Captured(graph=graph, numbers=numbers, result=result)


def _trim(shapes: OrderedDict[Shape, Any]) -> None:
    """Lets go of the shape not met for longest, if there are too many."""
    if len(shapes) > _MOST_SHAPES:
        shapes.popitem(last=False)
