"""What is told of a position is what its logits say: logprob, rank, top, tail, entropy, named tokens."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from logprobs_server.engine.events import PositionLogprobs
from logprobs_server.engine.logprobs import _top_by_key, log_sum_exp, position_logprobs, top_tokens
from logprobs_server.engine.types import LogprobOptions
from torch import Tensor

INF = math.inf
VOCAB = 12
ROUNDING = 1e-5
"""A few float32 roundings of numbers around 60."""
LOGITS = st.floats(-30, 30, width=32) | st.sampled_from([-INF, 0.0, 1.0, 1.0])
ROWS = st.lists(LOGITS, min_size=VOCAB, max_size=VOCAB).filter(lambda row: max(row) > -INF)


def position(row: list[float], token_id: int | None, **asked: object) -> PositionLogprobs | None:
    """What is told of one row of logits."""
    options = LogprobOptions(**asked)  # type: ignore[arg-type]
    return position_logprobs(torch.tensor([row]), [token_id], [options])[0]


def ordered(row: list[float]) -> list[int]:
    """Token ids by logit, then by lower id."""
    return sorted(range(len(row)), key=lambda token_id: (-row[token_id], token_id))


@given(ROWS, st.integers(0, VOCAB - 1), st.integers(0, VOCAB))
def test_every_number_is_that_of_float64(row: list[float], token_id: int, top_count: int) -> None:
    named = (3, 0, 11, 3)
    told = position(row, token_id, top_count=top_count, token_ids=named, entropy=True)
    exact = torch.tensor(row, dtype=torch.float64).log_softmax(dim=-1)
    assert told is not None
    assert told.logprob == pytest.approx(exact[token_id].item(), abs=ROUNDING)
    assert told.rank == 1 + sum(logit > row[token_id] for logit in row)
    assert told.greedy == (ordered(row)[0] == token_id)
    assert list(told.top_ids) == ordered(row)[:top_count]
    assert list(told.top_logprobs) == pytest.approx(exact[ordered(row)[:top_count]].tolist(), abs=ROUNDING)
    assert list(told.named_logprobs) == pytest.approx(exact[list(named)].tolist(), abs=ROUNDING)
    weighted = [-math.exp(logprob) * logprob for logprob in exact.tolist() if logprob > -INF]
    assert told.entropy == pytest.approx(math.fsum(weighted), abs=ROUNDING)


@given(ROWS, st.integers(1, VOCAB))
def test_the_tail_is_what_the_top_leaves(row: list[float], top_count: int) -> None:
    told = position(row, 0, top_count=top_count)
    rest = [row[token_id] for token_id in ordered(row)[top_count:]] or [-INF]
    exact = torch.tensor(rest, dtype=torch.float64).logsumexp(0) - torch.tensor(row, dtype=torch.float64).logsumexp(0)
    assert told is not None
    assert told.tail_logprob == pytest.approx(exact.item(), abs=ROUNDING)


def test_nothing_is_told_that_was_not_asked_for() -> None:
    told = position([0.0, 1.0], 1)
    assert told is not None
    assert (told.top_ids, told.top_logprobs, told.named_logprobs) == ([], [], ())
    assert (told.tail_logprob, told.entropy) == (None, None)


def test_rows_of_one_batch_are_told_what_each_asked_for() -> None:
    logits = torch.randn(4, VOCAB, generator=torch.Generator().manual_seed(0))
    options = [
        LogprobOptions(),
        LogprobOptions(top_count=VOCAB, entropy=True),
        LogprobOptions(token_ids=(5,)),
        LogprobOptions(top_count=2, token_ids=(1, 1)),
    ]
    token_ids = [1, 2, None, 4]
    alone = [position_logprobs(logits[i : i + 1], [token_ids[i]], [options[i]])[0] for i in range(4)]
    assert position_logprobs(logits, token_ids, options) == alone


def test_a_position_that_nobody_chose_a_token_for_has_no_logprob_and_no_rank() -> None:
    told = position([0.0, 1.0, 2.0], None, top_count=2)
    assert told is not None
    assert (told.token_id, told.logprob, told.rank, told.greedy) == (None, None, None, False)
    assert told.top_ids == [2, 1]


@pytest.mark.parametrize(
    "row", [[0.0, math.nan, 1.0], [0.0, INF, 1.0], [-INF, -INF, -INF], [INF, math.nan, -INF]], ids=str
)
def test_a_row_without_a_distribution_is_told_as_none_and_disturbs_no_other(row: list[float]) -> None:
    sound = [2.0, 1.0, 0.0]
    logits = torch.tensor([sound, row, sound])
    options = LogprobOptions(top_count=3, token_ids=(1,), entropy=True)
    first, second, third = position_logprobs(logits, [0, 0, 0], [options] * 3)
    assert second is None
    assert first == third == position(sound, 0, top_count=3, token_ids=(1,), entropy=True)


def test_a_masked_token_has_the_logprob_minus_infinity() -> None:
    told = position([0.0, -INF], 1, top_count=2)
    assert told is not None
    assert (told.logprob, told.rank, told.tail_logprob) == (-INF, 2, -INF)
    assert list(told.top_logprobs) == [0.0, -INF]


@pytest.mark.parametrize("top", [top_tokens, _top_by_key])
@given(st.lists(st.lists(LOGITS | st.just(-0.0), min_size=8, max_size=8), min_size=1, max_size=4))
def test_equal_logits_are_ordered_by_lower_id_wherever_the_cut_falls(
    top: Callable[[Tensor, int], tuple[Tensor, Tensor]], rows: list[list[float]]
) -> None:
    for count in range(1, 9):
        values, ids = top(torch.tensor(rows), count)
        assert ids.tolist() == [ordered(row)[:count] for row in rows]
        assert values.tolist() == [[row[i] for i in ordered(row)[:count]] for row in rows]


def test_the_log_sum_exp_of_a_large_vocabulary_is_that_of_float64() -> None:
    logits = 5 * torch.randn(3, 250_880, generator=torch.Generator().manual_seed(0))
    exact: Tensor = logits.double().logsumexp(dim=-1)
    assert (log_sum_exp(logits) - exact).abs().max() < 1e-6


def test_telling_leaves_the_logits_as_they_were() -> None:
    logits = torch.randn(2, VOCAB, generator=torch.Generator().manual_seed(0))
    before = logits.clone()
    position_logprobs(logits, [0, None], [LogprobOptions(top_count=3, token_ids=(1,), entropy=True)] * 2)
    assert torch.equal(logits, before)
