"""Drawn tokens follow exactly the distribution that was asked for, and say with what probability they were drawn."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, replace
from random import Random
from typing import Any

import pytest
import torch
from logprobs_server.engine.adjustment import Adjustment, JobAdjustment
from logprobs_server.engine.random import VocabularyNoise
from logprobs_server.engine.sampling import Draw, DrawnToken, draw_tokens
from logprobs_server.engine.types import SamplingOptions
from sampling_oracle import adjusted, drawn_from
from torch import Tensor

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
    "typical-p": {"typical_p": 0.6},
    "top-k and typical-p": {"top_k": 20, "typical_p": 0.8},
    "all and typical-p": {"top_k": 30, "top_p": 0.95, "min_p": 0.01, "typical_p": 0.7},
}
ADJUSTMENTS: dict[str, dict[str, Any]] = {
    "bias": {"logit_bias": ((3, 2.5), (7, -1.5), (20, -math.inf), (40, -math.inf))},
    "repetition": {"repetition_penalty": 1.7},
    "reward of repetition": {"repetition_penalty": 0.6},
    "presence": {"presence_penalty": 1.2},
    "frequency": {"frequency_penalty": 0.7},
    "reward of presence and frequency": {"presence_penalty": -0.4, "frequency_penalty": -0.3},
    "penalties": {"repetition_penalty": 1.3, "presence_penalty": 0.5, "frequency_penalty": 0.4},
    "penalties and bias": {"repetition_penalty": 1.3, "frequency_penalty": 0.4, "logit_bias": ((3, -2.0), (5, 4.0))},
    "penalties and cut-offs": {"repetition_penalty": 1.3, "presence_penalty": 0.5, "top_k": 25, "top_p": 0.9},
    "everything": {
        "repetition_penalty": 1.2,
        "presence_penalty": 0.3,
        "frequency_penalty": 0.2,
        "logit_bias": ((1, 1.0), (3, -math.inf), (5, -1.0)),
        "top_k": 30,
        "top_p": 0.95,
        "min_p": 0.01,
        "typical_p": 0.8,
    },
}
PROMPT = (1, 3, 3, 12, 31)
COMPLETION = (5, 3, 5, 17, 5, 44)


def options(temperature: float = 1.0, **given: Any) -> SamplingOptions:
    """Sampling with the defaults of the service where nothing is given."""
    return SamplingOptions(**({"temperature": temperature, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "seed": 0} | given))


def logits_of(vocab: int, seed: int = 5, spread: float = 1.5) -> Tensor:
    """One row of random logits, [1, vocab]."""
    return spread * torch.randn(1, vocab, generator=torch.Generator().manual_seed(seed))


def draw(logits: Tensor, draws: list[Draw]) -> list[DrawnToken]:
    """Draws with the noise that belongs to the vocabulary."""
    return draw_tokens(logits, draws, VocabularyNoise(logits.shape[-1], torch.device("cpu")))


def adjustment(
    chosen: SamplingOptions, prompt: Sequence[int] = PROMPT, completion: Sequence[int] = COMPLETION
) -> Adjustment:
    """What a completion of the prompt does to logits after it drew these tokens."""
    grown = Adjustment(JobAdjustment(chosen, prompt))
    for token_id in completion:
        grown.count(token_id)
    return grown


def draw_many(logits: Tensor, chosen: SamplingOptions, count: int) -> list[DrawnToken]:
    """Draws by that many seeds from one row of logits, after PROMPT and COMPLETION."""
    drawn, grown = [], adjustment(chosen)
    for first in range(0, count, ROWS):
        draws = [
            Draw(options=chosen, seed=seed, position=0, adjustment=grown)
            for seed in range(first, min(first + ROWS, count))
        ]
        drawn += draw(logits.expand(len(draws), -1), draws)
    return drawn


def expected(logits: Tensor, chosen: SamplingOptions) -> Tensor:
    """Log of the distribution to draw from after PROMPT and COMPLETION, [vocab] float64."""
    return drawn_from(logits[0], PROMPT, COMPLETION, {**asdict(chosen), "logit_bias": dict(chosen.logit_bias)})


def chi_square_bound(freedom: int) -> float:
    """What chi-square passes once in 30,000 times, by the approximation of Wilson and Hilferty (1931)."""
    spread = 2 / (9 * freedom)
    return float(freedom * (1 - spread + 4 * math.sqrt(spread)) ** 3)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("cuts", [*CUTS.values(), *ADJUSTMENTS.values()], ids=[*CUTS, *ADJUSTMENTS])
def test_tokens_are_drawn_as_often_as_they_are_probable(cuts: dict[str, Any], temperature: float) -> None:
    logits, chosen = logits_of(VOCAB), options(temperature, **cuts)
    tokens = draw_many(logits, chosen, NUM_DRAWS)
    drawn = Counter(token.token_id for token in tokens)
    counts = NUM_DRAWS * expected(logits, chosen).exp()
    told = {token.token_id: NUM_DRAWS * math.exp(token.sampling_logprob) for token in tokens}
    assert all(counts[token_id].item() == pytest.approx(mean, rel=1e-5) for token_id, mean in told.items())
    possible = counts.nonzero().flatten().tolist()
    assert set(drawn) <= set(possible)
    common = [i for i in possible if counts[i] >= 5]
    pairs = [(drawn[i], float(counts[i])) for i in common]
    pairs.append((NUM_DRAWS - sum(seen for seen, _ in pairs), NUM_DRAWS - sum(mean for _, mean in pairs)))
    pairs = [(seen, mean) for seen, mean in pairs if mean > 0.5]
    chi_square = sum((seen - mean) ** 2 / mean for seen, mean in pairs)
    assert chi_square < chi_square_bound(len(pairs) - 1)


@pytest.mark.parametrize("vocab", [VOCAB, WIDE_VOCAB])
@pytest.mark.parametrize("cuts", [*CUTS.values(), *ADJUSTMENTS.values()], ids=[*CUTS, *ADJUSTMENTS])
def test_sampling_logprob_and_set_size_are_those_of_the_distribution_drawn_from(
    cuts: dict[str, Any], vocab: int
) -> None:
    for seed in range(10):
        logits, chosen = logits_of(vocab, seed, spread=0.8), options(1.3, **cuts)
        logprobs = expected(logits, chosen)
        for token in draw_many(logits, chosen, 20):
            assert token.sampling_logprob == pytest.approx(float(logprobs[token.token_id]), abs=1e-5)
            assert token.set_size == int(logprobs.isfinite().sum())


def random_options(chance: Random, vocab: int) -> SamplingOptions:
    """Each option is the default or anything that is allowed and does something."""

    def maybe(value: float, default: float) -> float:
        return chance.choice([value, default])

    biased = chance.sample(range(vocab), chance.choice([0, 0, 1, 20]))
    return options(
        temperature=chance.uniform(0.3, 2),
        top_k=chance.choice([0, chance.randint(1, vocab)]),
        top_p=maybe(chance.uniform(0.05, 1), 1),
        min_p=maybe(chance.uniform(0, 0.3), 0),
        typical_p=maybe(chance.uniform(0.05, 1), 1),
        repetition_penalty=maybe(chance.uniform(0.5, 2), 1),
        presence_penalty=maybe(chance.gauss(0, 2), 0),
        frequency_penalty=maybe(chance.gauss(0, 2), 0),
        logit_bias=tuple((token_id, chance.choice([-math.inf, chance.gauss(0, 3)])) for token_id in biased),
    )


def test_the_tokens_left_and_their_distribution_are_those_of_transformers_whatever_is_combined() -> None:
    chance = Random(7)
    for case in range(200):
        vocab = chance.choice([VOCAB, WIDE_VOCAB])
        logits, chosen = logits_of(vocab, case), random_options(chance, vocab)
        logprobs = expected(logits, chosen)
        for token in draw_many(logits, chosen, 20):
            assert token.sampling_logprob == pytest.approx(float(logprobs[token.token_id]), abs=1e-5), chosen
            assert token.set_size == int(logprobs.isfinite().sum()), chosen


@pytest.mark.parametrize("given", ADJUSTMENTS.values(), ids=ADJUSTMENTS.keys())
def test_greedy_takes_the_most_probable_token_after_penalties_and_bias(given: dict[str, Any]) -> None:
    changed = 0
    for seed in range(200):
        logits, chosen = logits_of(VOCAB, seed), options(0.0, **given)
        best = int(adjusted(logits[0], PROMPT, COMPLETION, {**given, "logit_bias": dict(chosen.logit_bias)}).argmax())
        [token] = draw(logits, [Draw(options=chosen, seed=seed, position=0, adjustment=adjustment(chosen))])
        assert token == DrawnToken(token_id=best, sampling_logprob=0.0, set_size=1)
        changed += best != int(logits.argmax())
    assert changed > 0


def test_tokens_counted_one_by_one_are_penalized_as_those_counted_at_once() -> None:
    logits, chosen = logits_of(VOCAB), options(frequency_penalty=0.4, repetition_penalty=1.5)
    grown = adjustment(chosen, completion=())
    for length in range(len(COMPLETION) + 1):
        fresh = adjustment(chosen, completion=COMPLETION[:length])
        draws = [Draw(options=chosen, seed=3, position=0, adjustment=one) for one in (grown, fresh)]
        one, other = draw(logits.expand(2, -1), draws)
        assert one == other
        grown.count((*COMPLETION, 0)[length])


def test_what_passes_the_range_of_a_float_is_held_at_its_ends_and_nothing_is_banned() -> None:
    logits, largest = torch.zeros(1, 3), torch.finfo(torch.float32).max
    chosen = options(
        logit_bias=((0, -largest), (1, largest)), repetition_penalty=1e-30, frequency_penalty=-largest, top_k=3
    )
    grown = adjustment(chosen, prompt=(1,), completion=(1, 1))
    [token] = draw(logits, [Draw(options=chosen, seed=1, position=0, adjustment=grown)])
    assert (token.token_id, token.sampling_logprob) == (1, 0.0)
    greedy = replace(chosen, temperature=0.0)
    [token] = draw(logits, [Draw(options=greedy, seed=1, position=0, adjustment=adjustment(greedy, (0,), (2,)))])
    assert token.token_id == 1


@pytest.mark.parametrize(
    "cuts", [{"temperature": 0.0}, {}, {"top_k": 3}, {"typical_p": 0.5}], ids=["greedy", "whole", "cut", "typical"]
)
def test_a_set_of_no_tokens_is_told(cuts: dict[str, Any]) -> None:
    chosen = options(**cuts, logit_bias=((0, -math.inf), (1, -math.inf)))
    draws = [Draw(options=chosen, seed=1, position=0, adjustment=adjustment(chosen, (), ()), masked_ids=(2,))]
    [token] = draw(torch.zeros(1, 3), draws)
    assert token.set_size == 0


@pytest.mark.parametrize("cuts", [{}, {"top_k": 9}, {"min_p": 1e-300}, {"top_k": 9, "typical_p": 0.9999}], ids=str)
def test_tokens_too_improbable_to_be_drawn_are_still_counted(cuts: dict[str, Any]) -> None:
    logits = torch.zeros(1, 12)
    logits[0, 9:], logits[0, 3:9] = -torch.inf, -60.0
    [token] = draw(logits, [Draw(options=options(**cuts), seed=1, position=0)])
    assert token.token_id < 3
    assert token.set_size == (3 if "typical_p" in cuts else 9)


def test_neighbours_that_need_more_candidates_change_no_bit() -> None:
    logits = torch.cat([logits_of(WIDE_VOCAB, 1), logits_of(WIDE_VOCAB, 2, spread=0.01)])
    for cuts in CUTS.values():
        for seed in range(20):
            draws = [Draw(options=options(**cuts), seed=seed, position=0)]
            wide = Draw(options=options(**{**cuts, "top_p": 0.99}), seed=seed, position=0)
            assert draw(logits[:1], draws) == draw(logits, [*draws, wide])[:1]


def test_rows_with_different_options_do_not_disturb_each_other() -> None:
    given = [*CUTS.values(), *ADJUSTMENTS.values()]
    chosen = [options(temperature, **one) for one in given for temperature in (0.9, 0.0)]
    logits = torch.cat([logits_of(VOCAB, seed) for seed in range(len(chosen))])
    draws = [
        Draw(options=one, seed=40 + i, position=i, adjustment=adjustment(one) if i >= 2 * len(CUTS) else None)
        for i, one in enumerate(chosen)
    ]
    alone = [draw(logits[i : i + 1], [one])[0] for i, one in enumerate(draws)]
    assert draw(logits, draws) == alone


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
