"""Drawn tokens follow exactly the distribution that was asked for, and say with what probability they were drawn."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from logprobs_server.engine.random import VocabularyNoise
from logprobs_server.engine.sampling import Draw, DrawnToken, draw_tokens
from logprobs_server.engine.types import SamplingOptions
from torch import Tensor
from transformers import LogitsProcessorList, MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

VOCAB = 50
WIDE_VOCAB = 3000
NUM_DRAWS = 20_000
ROWS = 2_000
CUTS: dict[str, dict[str, Any]] = {
    "whole": {},
    "top-k": {"top_k": 9},
    "top-p": {"top_p": 0.7},
    "min-p": {"min_p": 0.08},
    "top-k and top-p": {"top_k": 20, "top_p": 0.8},
    "all": {"top_k": 20, "top_p": 0.9, "min_p": 0.02},
}


def options(temperature: float = 1.0, **given: Any) -> SamplingOptions:
    """Sampling with the defaults of the service where nothing is given."""
    return SamplingOptions(**({"temperature": temperature, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "seed": 0} | given))


def logits_of(vocab: int, seed: int = 5, spread: float = 1.5) -> Tensor:
    """One row of random logits, [1, vocab]."""
    return spread * torch.randn(1, vocab, generator=torch.Generator().manual_seed(seed))


def draw(logits: Tensor, draws: list[Draw]) -> list[DrawnToken]:
    """Draws with the noise that belongs to the vocabulary."""
    return draw_tokens(logits, draws, VocabularyNoise(logits.shape[-1], torch.device("cpu")))


def draw_many(logits: Tensor, chosen: SamplingOptions, count: int) -> list[DrawnToken]:
    """Draws by that many seeds from one row of logits."""
    drawn = []
    for first in range(0, count, ROWS):
        draws = [Draw(options=chosen, seed=seed, position=0) for seed in range(first, min(first + ROWS, count))]
        drawn += draw(logits.expand(len(draws), -1), draws)
    return drawn


def expected(logits: Tensor, chosen: SamplingOptions) -> Tensor:
    """Log of the distribution to draw from, [vocab] float64, by transformers' own cut-offs."""
    cuts: list[Callable[[Any, Tensor], Tensor]] = []
    if chosen.top_k:
        cuts.append(TopKLogitsWarper(chosen.top_k))
    if chosen.top_p < 1:
        cuts.append(TopPLogitsWarper(chosen.top_p))
    if chosen.min_p > 0:
        cuts.append(MinPLogitsWarper(chosen.min_p))
    scaled: Tensor = LogitsProcessorList(cuts)(None, logits.double() / chosen.temperature)
    return scaled.log_softmax(dim=-1).squeeze(0)


def chi_square_bound(freedom: int) -> float:
    """What chi-square passes once in 30,000 times, by the approximation of Wilson and Hilferty (1931)."""
    spread = 2 / (9 * freedom)
    return float(freedom * (1 - spread + 4 * math.sqrt(spread)) ** 3)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("cuts", CUTS.values(), ids=CUTS.keys())
def test_tokens_are_drawn_as_often_as_they_are_probable(cuts: dict[str, Any], temperature: float) -> None:
    logits, chosen = logits_of(VOCAB), options(temperature, **cuts)
    drawn = Counter(token.token_id for token in draw_many(logits, chosen, NUM_DRAWS))
    counts = NUM_DRAWS * expected(logits, chosen).exp()
    possible = counts.nonzero().flatten().tolist()
    assert set(drawn) <= set(possible)
    common = [i for i in possible if counts[i] >= 5]
    pairs = [(drawn[i], float(counts[i])) for i in common]
    pairs.append((NUM_DRAWS - sum(seen for seen, _ in pairs), NUM_DRAWS - sum(mean for _, mean in pairs)))
    pairs = [(seen, mean) for seen, mean in pairs if mean > 0.5]
    chi_square = sum((seen - mean) ** 2 / mean for seen, mean in pairs)
    assert chi_square < chi_square_bound(len(pairs) - 1)


@pytest.mark.parametrize("vocab", [VOCAB, WIDE_VOCAB])
@pytest.mark.parametrize("cuts", CUTS.values(), ids=CUTS.keys())
def test_sampling_logprob_and_set_size_are_those_of_the_distribution_drawn_from(
    cuts: dict[str, Any], vocab: int
) -> None:
    for seed in range(10):
        logits, chosen = logits_of(vocab, seed, spread=0.8), options(1.3, **cuts)
        logprobs = expected(logits, chosen)
        for token in draw_many(logits, chosen, 20):
            assert token.sampling_logprob == pytest.approx(float(logprobs[token.token_id]), abs=1e-5)
            assert token.set_size == int(logprobs.isfinite().sum())


def test_rows_with_different_options_do_not_disturb_each_other() -> None:
    logits = torch.cat([logits_of(VOCAB, seed) for seed in range(len(CUTS) + 1)])
    chosen = [*(options(0.9, **cuts) for cuts in CUTS.values()), options(0.0)]
    draws = [Draw(options=one, seed=40 + i, position=i) for i, one in enumerate(chosen)]
    alone = [draw(logits[i : i + 1], [one])[0] for i, one in enumerate(draws)]
    assert [token.token_id for token in draw(logits, draws)] == [token.token_id for token in alone]


@pytest.mark.parametrize("cuts", [{"temperature": 0.0}, {"top_k": 1}], ids=["temperature 0", "top-k 1"])
def test_of_equals_the_lowest_id_is_the_most_probable(cuts: dict[str, Any]) -> None:
    logits = torch.tensor([[0.0, 2.0, 1.0, 2.0, 2.0]])
    for seed in range(20):
        [token] = draw(logits, [Draw(options=options(**cuts), seed=seed, position=0)])
        assert token == DrawnToken(token_id=1, sampling_logprob=0.0, set_size=1)


def test_a_cut_among_equals_keeps_the_lowest_ids() -> None:
    logits = torch.zeros(1, VOCAB)
    logits[0, 30] = 1.0
    drawn = draw_many(logits, options(top_k=4), 400)
    assert {token.token_id for token in drawn} == {0, 1, 2, 30}
    assert {token.set_size for token in drawn} == {4}


@pytest.mark.parametrize("cuts", [{"temperature": 0.0}, *CUTS.values()], ids=["temperature 0", *CUTS])
def test_masked_tokens_are_never_drawn(cuts: dict[str, Any]) -> None:
    logits = logits_of(VOCAB)
    masked = tuple(logits.topk(3).indices[0].tolist())
    chosen = options(**cuts)
    draws = [Draw(options=chosen, seed=seed, position=0, masked_ids=masked) for seed in range(ROWS)]
    drawn = draw(logits.expand(ROWS, -1), draws)
    assert not {token.token_id for token in drawn} & set(masked)
    if chosen.temperature:
        rest = expected(logits.index_fill(1, torch.tensor(masked), -torch.inf), chosen)
        assert all(abs(token.sampling_logprob - rest[token.token_id]) < 1e-5 for token in drawn)


def test_drawing_leaves_the_logits_as_they_were() -> None:
    logits = logits_of(VOCAB)
    before = logits.clone()
    for cuts in CUTS.values():
        draw(logits, [Draw(options=options(0.5, **cuts), seed=1, position=0, masked_ids=(1, 2))])
    assert torch.equal(logits, before)


def test_the_token_drawn_depends_on_seed_and_position() -> None:
    logits = logits_of(WIDE_VOCAB, spread=0.1)
    draws = [Draw(options=options(), seed=seed, position=position) for seed in range(5) for position in range(5)]
    drawn = draw(logits.expand(len(draws), -1), draws)
    assert len({token.token_id for token in drawn}) > 20


def test_noise_in_the_last_bits_of_logits_does_not_change_what_is_drawn() -> None:
    logits = logits_of(WIDE_VOCAB).expand(200, -1)
    noise = 1e-6 * torch.randn(logits.shape, generator=torch.Generator().manual_seed(1))
    for cuts in CUTS.values():
        draws = [Draw(options=options(**cuts), seed=seed, position=0) for seed in range(len(logits))]
        pairs = zip(draw(logits, draws), draw(logits + noise, draws), strict=True)
        assert all(one.token_id == other.token_id for one, other in pairs)
