"""What tokens are drawn from: for every option, alone and combined, the distribution that transformers makes of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from harness import Served, Stream, ids
from logprobs.v1 import logprobs_pb2 as pb
from oracle import TOLERANCE, Oracle
from sampling_oracle import adjusted, drawn_from

PROMPT = [72, 105, 81, 105, 105, 33]
LENGTH, COUNT, SEED = 16, 4, 11
EOS_ID = 0
OPTIONS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "temperature": {"temperature": 0.5},
    "top_k": {"top_k": 12},
    "top_p": {"top_p": 0.75},
    "min_p": {"min_p": 0.125},
    "typical_p": {"typical_p": 0.5},
    "cut-offs": {"temperature": 1.5, "top_k": 40, "top_p": 0.875, "min_p": 0.03125, "typical_p": 0.75},
    "repetition_penalty": {"repetition_penalty": 1.5},
    "presence_penalty": {"presence_penalty": 2.5},
    "frequency_penalty": {"frequency_penalty": -0.75},
    "logit_bias": {"logit_bias": {40: 6.0, 41: -4.0, 42: -math.inf}},
    "penalties": {"repetition_penalty": 1.25, "presence_penalty": 0.5, "frequency_penalty": 0.75},
    "everything": {
        "temperature": 1.5,
        "top_k": 60,
        "top_p": 0.9375,
        "min_p": 0.015625,
        "typical_p": 0.875,
        "repetition_penalty": 1.25,
        "presence_penalty": 0.5,
        "frequency_penalty": 0.75,
        "logit_bias": {40: 5.0, 41: -4.0, 42: -math.inf},
    },
}
"""Values that float32 holds exactly: transformers computes with what the wire carries."""


@pytest.fixture(scope="module")
def oracle(tiny_folder: Path) -> Oracle:
    """The tiny model as transformers alone runs it."""
    return Oracle(tiny_folder)


def generated(served: Served, count: int = COUNT, seed: int = SEED, **options: Any) -> Stream:
    """Completions of PROMPT, of full length."""
    return served.generate(
        pb.GenerateRequest(
            prompt=ids(PROMPT),
            max_tokens=LENGTH,
            completion_count=count,
            sampling=pb.Sampling(seed=seed, **options),
            stopping=pb.Stopping(ignore_eos=True),
        )
    )


def logits_before(oracle: Oracle, completion: Sequence[int]) -> Any:
    """What each token of a completion of PROMPT is drawn after: [tokens, vocab] float32."""
    return oracle.logits([*PROMPT, *completion[:-1]])[len(PROMPT) - 1 :]


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_tokens_tell_the_distribution_they_were_drawn_from_beside_the_models(
    options: dict[str, Any], tiny: Served, oracle: Oracle
) -> None:
    stream = generated(tiny, **options)
    for index in range(COUNT):
        tokens, completion = stream.tokens(index), stream.token_ids(index)
        for step, row in enumerate(logits_before(oracle, completion)):
            token, before = tokens[step], completion[:step]
            own = row.double().log_softmax(dim=0)[token.id].item()
            assert token.logprob == pytest.approx(own, abs=TOLERANCE)
            drawn = drawn_from(row, PROMPT, before, options)
            assert token.sampling_logprob == pytest.approx(drawn[token.id].item(), abs=10 * TOLERANCE)
            assert token.sampling_set_size == int(drawn.isfinite().sum())


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_greedy_takes_the_most_probable_token_after_bias_and_penalties(
    options: dict[str, Any], tiny: Served, oracle: Oracle
) -> None:
    stream = generated(tiny, 1, **{**options, "temperature": 0.0})
    completion = stream.token_ids()
    expected = [
        int(adjusted(row, PROMPT, completion[:step], options).argmax())
        for step, row in enumerate(logits_before(oracle, completion))
    ]
    assert completion == expected
    assert {(token.sampling_logprob, token.sampling_set_size) for token in stream.tokens()} == {(0.0, 1)}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_completion_i_of_seed_s_is_the_completion_of_seed_s_plus_i(options: dict[str, Any], tiny: Served) -> None:
    many = generated(tiny, **options)
    for index in range(COUNT):
        alone = generated(tiny, 1, SEED + index, **options)
        assert many.token_ids(index) == alone.token_ids()
        for token, again in zip(many.tokens(index), alone.tokens(), strict=True):
            assert token.sampling_set_size == again.sampling_set_size
            assert token.sampling_logprob == pytest.approx(again.sampling_logprob, abs=10 * TOLERANCE)


def test_a_banned_token_is_never_drawn(tiny: Served) -> None:
    plain = generated(tiny, temperature=0.0)
    banned = dict.fromkeys(plain.token_ids(), -math.inf)
    for temperature in (0.0, 1.0):
        stream = generated(tiny, temperature=temperature, logit_bias=banned)
        drawn = {token_id for index in range(COUNT) for token_id in stream.token_ids(index)}
        assert drawn.isdisjoint(banned)


def test_a_bias_of_0_changes_nothing(tiny: Served) -> None:
    biased = generated(tiny, logit_bias={40: 0.0})
    assert [biased.token_ids(i) for i in range(COUNT)] == [generated(tiny).token_ids(i) for i in range(COUNT)]


def test_the_models_own_numbers_do_not_depend_on_how_tokens_are_drawn(tiny: Served) -> None:
    for options in OPTIONS.values():
        stream = generated(tiny, 1, **options)
        request = pb.ScoreRequest(context=ids(PROMPT), continuations=[ids(stream.token_ids())])
        [scored] = tiny.score(request)
        for token, again in zip(stream.tokens(), scored.tokens, strict=True):
            assert (token.rank, token.logprob) == (again.rank, pytest.approx(again.logprob, abs=TOLERANCE))


def test_min_tokens_masks_the_end_of_sequence_however_it_is_biased(tiny: Served) -> None:
    request = pb.GenerateRequest(
        prompt=ids(PROMPT),
        max_tokens=9,
        sampling=pb.Sampling(logit_bias={EOS_ID: 1000}, seed=SEED),
        stopping=pb.Stopping(min_tokens=6),
    )
    stream = tiny.generate(request)
    assert len(stream.tokens()) == 7
    assert stream.token_ids().index(EOS_ID) == 6
    assert stream.finished().reason == pb.FINISH_REASON_END_OF_SEQUENCE
