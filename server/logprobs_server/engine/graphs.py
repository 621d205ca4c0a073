"""CUDA graphs of steps: one for each shape, captured when the shape returns, replayed from then on.

A step has about a thousand operations. Asked for one by one they cost the host many times what they cost the GPU.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from logprobs_server.engine.device_batch import Shape
from logprobs_server.engine.transfer import sent

__all__ = ["StepGraphs"]

_MOST_SHAPES = 128
"""Shapes remembered; beyond them the one not met for longest is forgotten, and its graph with it."""


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
        self._met: OrderedDict[Shape, _Captured | None] = OrderedDict()

    def replay(self, numbers: Sequence[int], shape: Shape) -> Tensor:
        """What `run` gives for these numbers. A new shape is run as it is: most of those never return."""
        given = torch.tensor(numbers).pin_memory()
        if shape not in self._met:
            self._met[shape] = None
            if len(self._met) > _MOST_SHAPES:
                self._met.popitem(last=False)
            return self._run(sent(given, self._device), shape)
        self._met.move_to_end(shape)
        captured = self._met[shape]
        if captured is None:
            captured = self._met[shape] = self._capture(sent(given, self._device), shape)
        captured.numbers.copy_(given, non_blocking=True)
        captured.graph.replay()
        return captured.result.clone()

    def _capture(self, numbers: Tensor, shape: Shape) -> _Captured:
        """Records what was run once before, so that libraries have made what they need."""
        graph = torch.cuda.CUDAGraph()
        with (
            torch.cuda.device(self._device),
            torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"),
        ):
            result = self._run(numbers, shape)
        return _Captured(graph=graph, numbers=numbers, result=result)
