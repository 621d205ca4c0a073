"""The reference question, "The horse raced past the barn fell." token by token, with numbers known beforehand."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from harness import Served, running, text
from logprobs.v1 import logprobs_pb2 as pb
from transformers.utils import cached_file

TEXT = "The horse raced past the barn fell."
TOP = 5
TOLERANCE = 1e-3
BLOOM = "bigscience/bloom-560m"
EMBEDDED_TOKENS = {
    "The": None,
    " horse": -16.071,
    " raced": -8.589,
    " past": -13.942,
    " the": -0.120,
    " barn": -1.047,
    " fell": -10.875,
    ".": -2.796,
}
BLOOM_TOKENS = {
    "The": None,
    " horse": -10.1476,
    " rac": -8.0964,
    "ed": -0.0763,
    " past": -3.5100,
    " the": -1.5751,
    " barn": -4.3994,
    " fell": -10.9558,
    ".": -4.5583,
}


def check(served: Served, expected: dict[str, float | None]) -> None:
    """Scores the text and compares; the first token has no logprob, and every other one its alternatives."""
    request = pb.ScoreRequest(context=text(TEXT), logprobs=pb.LogprobOptions(top_count=TOP))
    first, *rest = served.score(request)[0].tokens
    assert [token.bytes.decode() for token in (first, *rest)] == list(expected)
    assert not first.HasField("logprob")
    assert not first.top
    assert [token.logprob for token in rest] == pytest.approx(list(expected.values())[1:], abs=TOLERANCE)
    assert [len(token.top) for token in rest] == [TOP] * len(rest)


def test_the_embedded_model_answers_the_reference_question(embedded: Served) -> None:
    check(embedded, EMBEDDED_TOKENS)


@pytest.fixture(scope="module")
def bloom() -> Iterator[Served]:
    """The model of the specification, where its weights are already."""
    config = cached_file(BLOOM, "config.json", local_files_only=True, _raise_exceptions_for_missing_entries=False)
    weights = cached_file(
        BLOOM, "model.safetensors", local_files_only=True, _raise_exceptions_for_missing_entries=False
    )
    if config is None or weights is None:
        pytest.skip(f"the weights of {BLOOM} are not in the local hub cache")
    with running(Path(weights).parent, threads=2, kv_cache_mib=None) as served:
        yield served


def test_bloom_answers_the_reference_question(bloom: Served) -> None:
    check(bloom, BLOOM_TOKENS)
