"""What was computed for one call is not computed again for the next, scoring included, and callers are told so."""

from __future__ import annotations

from pathlib import Path

from harness import ids, running
from logprobs.v1 import logprobs_pb2 as pb

CONTEXT = [(7 * i) % 300 for i in range(100)]
BLOCKS = 96
"""Tokens of the context that fill whole blocks."""


def test_a_context_seen_before_is_not_computed_again(tiny_folder: Path) -> None:
    request = pb.ScoreRequest(context=ids(CONTEXT), continuations=[ids([5, 6]), ids([8])])
    with running(tiny_folder) as served:
        first, second = served.stub.Score(request), served.stub.Score(request)
        [streamed] = served.stub.ScoreStream(iter([pb.ScoreStreamRequest(id="a", request=request)]))
    assert (first.usage.cached_token_count, second.usage.cached_token_count) == (0, BLOCKS)
    assert streamed.response.usage.cached_token_count == BLOCKS
    assert list(second.sequences) == list(first.sequences) == list(streamed.response.sequences)


def test_a_prompt_that_was_scored_is_not_computed_again_to_generate(tiny_folder: Path) -> None:
    scored = pb.GenerateRequest(prompt=ids(CONTEXT), max_tokens=0, prompt_logprobs=pb.LogprobOptions(top_count=2))
    drawn = pb.GenerateRequest(prompt=ids(CONTEXT), max_tokens=8, sampling=pb.Sampling(seed=1))
    with running(tiny_folder) as served:
        alone = served.generate(drawn).tokens()
    with running(tiny_folder) as served:
        assert served.generate(scored).started.cached_token_count == 0
        after = served.generate(drawn)
    assert after.started.cached_token_count == BLOCKS
    assert after.tokens() == alone
