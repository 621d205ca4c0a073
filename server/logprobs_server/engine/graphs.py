"""CUDA graphs of decoding steps: one for each shape, captured when the shape is first met, replayed from then on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from logprobs_server.engine.transfer import sent

__all__ = ["DecodeGraphs"]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Captured:
    graph: torch.cuda.CUDAGraph
    numbers: Tensor
    result: Tensor


class DecodeGraphs:
    """Graphs of one function, in one pool of memory: none is replayed before the result of another was copied.

    run: takes numbers that are on the device and a shape; does the same work whatever the numbers are.
    """

    def __init__(self, run: Callable[[Tensor, tuple[int, int]], Tensor], device: torch.device) -> None:
        self._run = run
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()
        self._captured: dict[tuple[int, int], _Captured] = {}

    def replay(self, numbers: Sequence[int], shape: tuple[int, int]) -> Tensor:
        """What `run` gives for these numbers."""
        given = torch.tensor(numbers).pin_memory()
        if shape not in self._captured:
            self._captured[shape] = self._capture(sent(given, self._device), shape)
        captured = self._captured[shape]
        captured.numbers.copy_(given, non_blocking=True)
        captured.graph.replay()
        return captured.result.clone()

    def _capture(self, numbers: Tensor, shape: tuple[int, int]) -> _Captured:
        """Runs once on a side stream, so that libraries make what they need, then again to record."""
        with torch.cuda.device(self._device):
            side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                self._run(numbers, shape)
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                result = self._run(numbers, shape)
        return _Captured(graph=graph, numbers=numbers, result=result)
