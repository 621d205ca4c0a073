"""The CPU's kernels tell and draw what torch's own operations do, on odd rows too."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import pytest
import torch
from logprobs_server.engine import kernels
from logprobs_server.engine.events import PositionLogprobs
from logprobs_server.engine.logprobs import position_logprobs
from logprobs_server.engine.random import VocabularyNoise
from logprobs_server.engine.sampling import Draw, draw_tokens
from logprobs_server.engine.types import LogprobOptions, SamplingOptions
from serving import skip_without_kernels

_R = TypeVar("_R")
VOCABULARY_SIZE = 20_011  # more than two chunks of a row, the last of them uneven


def on_both(patch: pytest.MonkeyPatch, work: Callable[[], list[_R]]) -> tuple[list[_R], list[_R]]:
    """What the kernels give, and what torch gives."""
    skip_without_kernels(True)
    by_kernels = work()
    patch.setattr(kernels, "in_use", lambda tensor: False)
    return by_kernels, work()


def odd_rows() -> torch.Tensor:
    """Rows with ties at the top, NaN, +inf, nothing but -inf, mostly -inf, all equal, and a plain one."""
    logits = 4 * torch.randn(7, VOCABULARY_SIZE, generator=torch.Generator().manual_seed(0))
    logits[0, [9, 5, 20_000]] = logits[0].max() + 1
    logits[1, 3] = torch.nan
    logits[2, 20_010] = torch.inf
    logits[3] = -torch.inf
    logits[4, 100:] = -torch.inf
    logits[5] = 1.0
    return logits


def plain(position: PositionLogprobs) -> list[float]:
    """The numbers that may differ in their last bits."""
    assert position.entropy is not None
    tail = [] if position.tail_logprob is None else [position.tail_logprob]
    return [position.logprob or 0.0, *position.top_logprobs, *tail, *position.named_logprobs, position.entropy]


def test_kernels_tell_of_odd_rows_what_torch_tells(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = odd_rows()
    before = logits.clone()
    options = [LogprobOptions(top_count=count, token_ids=(1, 2), entropy=True) for count in (2, 3, 1, 4, 0, 20, 100)]
    token_ids = [9, 1, 2, 3, 200, 5, None]
    ours, theirs = on_both(monkeypatch, lambda: position_logprobs(logits, token_ids, options))
    assert [position is None for position in ours] == [False, True, True, True, False, False, False]
    for one, other in zip(ours, theirs, strict=True):
        assert (one is None) == (other is None)
        if one is not None and other is not None:
            assert (one.rank, one.greedy, one.top_ids) == (other.rank, other.greedy, other.top_ids)
            assert plain(one) == pytest.approx(plain(other), abs=1e-5)
    assert torch.equal(logits.nan_to_num(nan=7.0), before.nan_to_num(nan=7.0))


@pytest.mark.parametrize("gap", [80.0, 100.0])
def test_kernels_tell_the_tail_of_a_row_that_is_all_but_certain(gap: float, monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.full((1, 300), -gap)
    logits[0, 7] = 0.0
    options = [LogprobOptions(top_count=1)]
    (ours,), (theirs,) = on_both(monkeypatch, lambda: position_logprobs(logits, [7], options))
    assert ours is not None
    assert theirs is not None
    assert ours.tail_logprob == pytest.approx(theirs.tail_logprob, abs=0.02)


def test_what_kernels_tell_of_a_row_does_not_depend_on_the_others() -> None:
    skip_without_kernels(True)
    logits, options = odd_rows(), LogprobOptions(top_count=5, entropy=True)
    together = position_logprobs(logits, [5] * 7, [options] * 7)
    assert together == [position_logprobs(logits[i : i + 1], [5], [options])[0] for i in range(7)]


def test_kernels_draw_what_torch_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = 3 * torch.randn(32, VOCABULARY_SIZE, generator=torch.Generator().manual_seed(1))
    noise = VocabularyNoise(VOCABULARY_SIZE, torch.device("cpu"))
    draws = [
        Draw(
            options=SamplingOptions(temperature=0.25 + i / 16, top_k=0, top_p=1.0, min_p=0.0, seed=i),
            seed=2**40 + i,
            position=i,
            masked_ids=(i, 7) if i % 3 else (),
        )
        for i in range(32)
    ]
    ours, theirs = on_both(monkeypatch, lambda: draw_tokens(logits, draws, noise))
    assert [(d.token_id, d.set_size) for d in ours] == [(d.token_id, d.set_size) for d in theirs]
    assert [d.sampling_logprob for d in ours] == pytest.approx([d.sampling_logprob for d in theirs], abs=1e-5)


def test_a_temperature_given_as_an_integer_is_that_temperature(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.randn(2, 300, generator=torch.Generator().manual_seed(2))
    noise = VocabularyNoise(300, torch.device("cpu"))
    options = SamplingOptions(temperature=2, top_k=0, top_p=1.0, min_p=0.0, seed=1)
    draws = [Draw(options=options, seed=i, position=0) for i in range(2)]
    ours, theirs = on_both(monkeypatch, lambda: draw_tokens(logits, draws, noise))
    assert [(d.token_id, d.set_size) for d in ours] == [(d.token_id, 300) for d in theirs]
