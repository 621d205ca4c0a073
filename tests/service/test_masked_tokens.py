"""What a model rules out has the logprob -inf on the wire, and that is a number like others in what follows from it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import pytest
from harness import Served, ids, running
from logprobs.v1 import logprobs_pb2 as pb
from torch import Tensor

MASKED = 9


@pytest.fixture(scope="module")
def masking(tiny_folder: Path) -> Iterator[Served]:
    """A server whose model gives one token no probability at all."""
    with running(tiny_folder, max_top_count=300) as served, pytest.MonkeyPatch.context() as patch:
        model = served.engine._model
        logits = model.logits

        def masked(hidden: Tensor) -> Tensor:
            found = logits(hidden).clone()
            found[:, MASKED] = -math.inf
            return found

        patch.setattr(model, "logits", masked)
        yield served


def test_a_masked_token_has_the_logprob_minus_infinity_and_so_has_its_total(masking: Served) -> None:
    options = pb.LogprobOptions(top_count=300, token_ids=[MASKED, 7], entropy=True)
    [sequence] = masking.score(pb.ScoreRequest(context=ids([5, MASKED, 7]), logprobs=options))
    first, masked, after = sequence.tokens
    assert not first.HasField("logprob")
    assert (masked.logprob, masked.rank) == (-math.inf, 300)
    assert [token.named[0].logprob for token in (masked, after)] == [-math.inf] * 2
    assert (masked.top[-1].id, masked.top[-1].logprob) == (MASKED, -math.inf)
    assert all(0 < token.entropy < math.log(300) for token in (masked, after))
    assert math.isfinite(after.logprob)
    assert sequence.totals.logprob == -math.inf


def test_the_pmi_of_two_masked_totals_is_not_defined(masking: Served) -> None:
    request = pb.ScoreRequest(context=ids([5]), continuations=[ids([MASKED]), ids([7])], neutral_context=ids([6]))
    masked, other = masking.score(request)
    assert not masked.HasField("pmi")
    assert math.isfinite(other.pmi)


def test_a_masked_token_is_never_drawn(masking: Served) -> None:
    sampling = pb.Sampling(temperature=1e6, seed=2)
    request = pb.GenerateRequest(
        prompt=ids([5]), max_tokens=50, completion_count=20, sampling=sampling, stopping=pb.Stopping(ignore_eos=True)
    )
    stream = masking.generate(request)
    tokens = [token for i in range(20) for token in stream.tokens(i)]
    assert len(tokens) == 1000
    assert all(token.id != MASKED and token.sampling_set_size == 299 for token in tokens)
