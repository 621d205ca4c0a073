"""Comparing completions: known answers for each criterion and measure."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st
from logprobs.ranking import Criterion, bits_per_byte, mean_logprob, perplexity, rank
from logprobs.v1 import logprobs_pb2 as pb


@dataclass(frozen=True)
class Draw:
    index: int
    totals: pb.Totals


def draw(index: int, token_count: int, logprob: float) -> Draw:
    return Draw(index, pb.Totals(token_count=token_count, logprob=logprob))


def order(*draws: Draw, **options: object) -> list[int]:
    return [d.index for d in rank(draws, **options)]  # type: ignore[arg-type]


LONG, SHORT, MIDDLE = draw(0, 10, -5.0), draw(1, 2, -1.5), draw(2, 4, -2.2)
"""Means -0.5, -0.75, -0.55."""

CASES = [
    pytest.param({"criterion": "mean"}, [0, 2, 1], id="mean"),
    pytest.param({}, [0, 2, 1], id="mean is the default"),
    pytest.param({"criterion": "total"}, [1, 2, 0], id="total"),
    pytest.param({"criterion": "length_normalized"}, [0, 2, 1], id="exponent 1 is the mean"),
    pytest.param({"criterion": "length_normalized", "length_exponent": 0.0}, [1, 2, 0], id="exponent 0 is the total"),
    pytest.param({"criterion": "length_normalized", "length_exponent": 0.6}, [2, 1, 0], id="between"),
]


@pytest.mark.parametrize(("options", "expected"), CASES)
def test_each_criterion_has_its_own_order(options: dict[str, object], expected: list[int]) -> None:
    assert order(LONG, SHORT, MIDDLE, **options) == expected


@given(st.permutations([draw(i, 2, -1.0) for i in range(5)]))
def test_equal_completions_are_ordered_by_index(draws: list[Draw]) -> None:
    assert order(*draws) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("criterion", get_args(Criterion))
def test_a_completion_without_tokens_goes_last(criterion: str) -> None:
    assert order(draw(0, 0, 0.0), draw(1, 3, -900.0), criterion=criterion) == [1, 0]


def test_an_unknown_criterion_is_refused() -> None:
    with pytest.raises(ValueError, match="'median' is none of"):
        order(LONG, criterion="median")


def test_the_measures_of_totals() -> None:
    totals = pb.Totals(token_count=4, byte_count=8, logprob=-4 * math.log(2))
    assert mean_logprob(totals) == pytest.approx(-math.log(2))
    assert perplexity(totals) == pytest.approx(2)
    assert bits_per_byte(totals) == pytest.approx(0.5)


def test_nothing_has_no_measures() -> None:
    empty = pb.Totals()
    assert (mean_logprob(empty), perplexity(empty), bits_per_byte(empty)) == (None, None, None)


@pytest.mark.parametrize("logprob", [-1000.0, -math.inf])
def test_the_perplexity_of_the_impossible_is_infinite(logprob: float) -> None:
    assert perplexity(pb.Totals(token_count=1, logprob=logprob)) == math.inf
