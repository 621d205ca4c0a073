"""Which steps are replayed, which are run as they are, and what is let go of. What a graph does is for test_gpu.py."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from devices import CPU
from logprobs_server.engine import graphs
from logprobs_server.engine.device_batch import GroupShape, Shape
from logprobs_server.engine.graphs import StepGraphs
from torch import Tensor


def shape(rows: int) -> Shape:
    return Shape(rows=rows, groups=(GroupShape(count=1, length=1, width=8),), leading=True)


@dataclass
class Graph:
    """Does again what was done with the same memory."""

    numbers: Tensor
    result: Tensor

    def replay(self) -> None:
        self.result.copy_(self.numbers * 2)


class Recorder:
    """Step graphs without a GPU, and what was run and captured, by rows."""

    def __init__(self, patch: pytest.MonkeyPatch, refused: Sequence[int] = ()) -> None:
        self.run: list[int] = []
        self.captured: list[int] = []

        def run(numbers: Tensor, shape: Shape) -> Tensor:
            self.run.append(shape.rows)
            return numbers * 2

        def capture(own: StepGraphs, numbers: Tensor, shape: Shape) -> Any:
            self.captured.append(shape.rows)
            if shape.rows in refused:
                return None
            result = numbers * 2
            graph: Any = Graph(numbers, result)
            return graphs._Captured(graph=graph, numbers=numbers, result=result)

        patch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 0))
        patch.setattr(Tensor, "pin_memory", lambda tensor: tensor)
        patch.setattr(StepGraphs, "_capture", capture)
        patch.setattr(graphs, "_MOST_SHAPES", 4)
        self.graphs = StepGraphs(run, CPU)

    def step(self, number: int, rows: int) -> None:
        assert self.graphs.replay([number, number + 1], shape(rows)).tolist() == [2 * number, 2 * number + 2]


def test_a_shape_is_captured_when_it_returns_and_replayed_with_new_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder(monkeypatch)
    for number in range(5):
        recorder.step(number, 1)
    assert (recorder.run, recorder.captured) == ([1], [1])


def test_shapes_that_never_return_push_out_no_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder(monkeypatch)
    for rows in (1, 1, *range(10, 30), 1):
        recorder.step(rows, rows)
    assert recorder.captured == [1]
    assert recorder.run == [1, *range(10, 30)]


def test_the_graph_not_used_for_longest_goes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder(monkeypatch)
    for rows in (1, 1, 2, 2, 3, 3, 4, 4, 1, 5, 5, 1, 2):
        recorder.step(rows, rows)
    assert recorder.captured == [1, 2, 3, 4, 5]
    assert recorder.run == [1, 2, 3, 4, 5, 2]


def test_a_shape_that_cannot_be_captured_is_run_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder(monkeypatch, refused=[1])
    for number in range(4):
        recorder.step(number, 1)
    assert (recorder.run, recorder.captured) == ([1, 1, 1, 1], [1])
