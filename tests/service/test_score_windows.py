"""Scoring beyond one pass: after a neutral context, in windows of a long text, and of the whole next distribution."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from harness import Served, ids, refusal, running, text
from logprobs.v1 import logprobs_pb2 as pb
from tiny_models import save_model
from transformers import LlamaConfig

WINDOW = 32
TOLERANCE = 1e-4
LIMIT = 65_536
IDS = [(7 * i * i + 3 * i) % 299 + 1 for i in range(100)]
ROLL = pb.LONG_INPUT_ROLL


@pytest.fixture(scope="module")
def short(tiny_folder: Path) -> Iterator[Served]:
    """A server whose windows are short."""
    with running(tiny_folder, context_length=WINDOW, allow_full_distribution=True, max_response_bytes=LIMIT) as served:
        yield served


def scored(served: Served, context: pb.Input, *continuations: pb.Input, **fields: Any) -> Sequence[pb.ScoredSequence]:
    """The sequences of an answer."""
    return served.score(pb.ScoreRequest(context=context, continuations=continuations, **fields))


def logprob_of(served: Served, before: Sequence[int], token_id: int) -> float:
    """Of one token after others, in a request of its own."""
    [sequence] = scored(served, ids(before), ids([token_id]))
    return sequence.tokens[0].logprob


def context_of(index: int, first: int, stride: int, length: int) -> int:
    """Where the window starts that scores the token at `index`, found window by window."""
    stop = max(WINDOW, first + stride)
    while stop <= index:
        stop += stride
    return max(0, min(stop, length) - WINDOW)


# rolling windows


@pytest.mark.parametrize("stride", [1, 5, 16, 31, None])
@pytest.mark.parametrize("length", [33, 48, 49, 100])
def test_each_token_of_a_long_text_is_scored_once_in_its_window(length: int, stride: int | None, short: Served) -> None:
    sequence_ids = IDS[:length]
    fields = {} if stride is None else {"roll_stride": stride}
    [sequence] = scored(short, ids(sequence_ids), long_input=ROLL, **fields)
    assert [token.id for token in sequence.tokens] == sequence_ids
    assert [token.HasField("logprob") for token in sequence.tokens] == [False] + [True] * (length - 1)
    assert sequence.totals.token_count == length - 1
    assert sequence.totals.logprob == pytest.approx(math.fsum(t.logprob for t in sequence.tokens), abs=TOLERANCE)
    for index in {1, WINDOW - 1, WINDOW, length // 2, length - 2, length - 1}:
        start = context_of(index, 0, stride or WINDOW // 2, length)
        alone = logprob_of(short, sequence_ids[start:index], sequence_ids[index])
        assert sequence.tokens[index].logprob == pytest.approx(alone, abs=TOLERANCE)


@pytest.mark.parametrize("first", [1, 20, 31, 32, 60, 95])
def test_a_continuation_of_a_long_context_has_full_windows(first: int, short: Served) -> None:
    stride = 8
    request: dict[str, Any] = {"long_input": ROLL, "roll_stride": stride}
    fitting, rolled = scored(short, ids(IDS[:first]), ids([]), ids(IDS[first:]), **request)
    assert fitting.context_token_count == rolled.context_token_count == first
    assert not fitting.tokens
    assert [token.id for token in rolled.tokens] == IDS[first:]
    for index in {first, min(first + stride, 99), 99}:
        alone = logprob_of(short, IDS[context_of(index, first, stride, 100) : index], IDS[index])
        assert rolled.tokens[index - first].logprob == pytest.approx(alone, abs=TOLERANCE)


def test_rolling_changes_nothing_of_what_fits(short: Served) -> None:
    plain = scored(short, ids(IDS[:10]), ids(IDS[10:20]), ids(IDS[10:32]))
    rolled = scored(short, ids(IDS[:10]), ids(IDS[10:20]), ids(IDS[10:32]), long_input=ROLL, roll_stride=3)
    for one, other in zip(plain, rolled, strict=True):
        assert [t.id for t in one.tokens] == [t.id for t in other.tokens]
        assert other.totals.logprob == pytest.approx(one.totals.logprob, abs=TOLERANCE)


def test_the_next_token_of_a_long_text_follows_its_last_window(short: Served) -> None:
    options = pb.LogprobOptions(top_count=3, token_ids=[7])
    [long] = scored(short, ids(IDS), long_input=ROLL, next_token=True, logprobs=options)
    [last] = scored(short, ids(IDS[-WINDOW:]), next_token=True, logprobs=options)
    assert [a.id for a in long.next.top] == [a.id for a in last.next.top]
    assert long.next.named[0].logprob == pytest.approx(last.next.named[0].logprob, abs=TOLERANCE)


def test_the_tokens_of_a_long_text_count_once(short: Served) -> None:
    request = pb.ScoreRequest(context=ids(IDS[:40]), continuations=[ids(IDS[40:])] * 3, long_input=ROLL)
    assert short.stub.Score(request).usage.input_token_count == 40 + 3 * 60


# the neutral context


@pytest.mark.parametrize("context", [text("the horse"), text(""), ids([5, 6, 7])], ids=["text", "empty", "ids"])
def test_pmi_is_the_total_less_that_of_the_same_tokens_after_the_neutral_context(
    context: pb.Input, tiny: Served
) -> None:
    neutral, continuations = ids([9, 4]), [text(" past the barn"), ids([7, 8]), text("")]
    sequences = scored(tiny, context, *continuations, neutral_context=neutral)
    for sequence in sequences:
        told = [token.id for token in sequence.tokens]
        skipped = len(told) - sequence.totals.token_count
        [after] = scored(tiny, neutral, ids(told))
        total = math.fsum(token.logprob for token in after.tokens[skipped:])
        assert sequence.pmi == pytest.approx(sequence.totals.logprob - total, abs=TOLERANCE)
    assert any(sequence.pmi != 0 for sequence in sequences)
    assert sequences[-1].pmi == 0


def test_the_neutral_context_changes_no_other_number(tiny: Served) -> None:
    plain = scored(tiny, text("the ho"), text("rse"))
    [sequence] = scored(tiny, text("the ho"), text("rse"), neutral_context=text("a"))
    assert sequence.HasField("pmi")
    sequence.ClearField("pmi")
    assert [sequence] == list(plain)


def test_without_a_neutral_context_there_is_no_pmi(tiny: Served) -> None:
    [sequence] = scored(tiny, text("the ho"), text("rse"))
    assert not sequence.HasField("pmi")


def test_the_neutral_context_rolls_too(short: Served) -> None:
    [sequence] = scored(short, ids([5]), ids(IDS[:20]), neutral_context=ids(IDS[50:80]), long_input=ROLL)
    whole = [*IDS[50:80], *IDS[:20]]
    total = math.fsum(logprob_of(short, whole[context_of(i, 30, 16, 50) : i], whole[i]) for i in range(30, 50))
    assert sequence.pmi == pytest.approx(sequence.totals.logprob - total, abs=1e-3)


def test_the_neutral_context_counts_as_input(tiny: Served) -> None:
    request = pb.ScoreRequest(context=ids([1, 2]), continuations=[ids([3]), ids([4])], neutral_context=ids([5, 6, 7]))
    assert tiny.stub.Score(request).usage.input_token_count == 2 + 2 + 3


# the whole distribution


def test_the_whole_distribution_is_that_of_every_token_by_name(short: Served) -> None:
    request: dict[str, Any] = {"next_token": True, "full_distribution": True}
    first, second = scored(short, text("the"), text(" horse"), text(""), **request)
    for sequence in (first, second):
        assert len(sequence.next.logprobs) == 300
        assert math.fsum(map(math.exp, sequence.next.logprobs)) == pytest.approx(1, abs=1e-5)
    named = pb.LogprobOptions(token_ids=range(100, 200))
    [again] = scored(short, text("the"), text(" horse"), next_token=True, logprobs=named)
    assert not again.next.logprobs
    assert list(first.next.logprobs[100:200]) == pytest.approx([a.logprob for a in again.next.named], abs=TOLERANCE)


def test_whole_distributions_are_split_over_messages(short: Served) -> None:
    request = pb.ScoreRequest(
        context=text("the"), continuations=[ids([i]) for i in range(80)], next_token=True, full_distribution=True
    )
    refused = refusal(lambda: short.stub.Score(request))
    assert refused.fields == ["logprobs"]
    responses = list(short.stub.ScoreStream(iter([pb.ScoreStreamRequest(id="a", request=request)])))
    assert max(response.ByteSize() for response in responses) <= LIMIT
    values: dict[int, list[float]] = {}
    for response in responses[:-1]:
        values.setdefault(response.part.sequence, []).extend(response.part.next_logprobs)
    assert [len(values[i]) for i in range(80)] == [300] * 80
    assert not any(sequence.next.logprobs for sequence in responses[-1].response.sequences)
    [alone] = scored(short, text("the"), ids([79]), next_token=True, full_distribution=True)
    assert values[79] == pytest.approx(list(alone.next.logprobs), abs=TOLERANCE)


def test_a_distribution_larger_than_a_message_is_split_too(tmp_path: Path) -> None:
    size, settings = 40_000, {"allow_full_distribution": True, "context_length": WINDOW}
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    save_model(LlamaConfig(vocab_size=size, **sizes), tmp_path)
    request = pb.ScoreRequest(context=text("the"), next_token=True, full_distribution=True)
    with running(tmp_path, **settings) as served:
        [whole] = served.score(request)
    with running(tmp_path, max_response_bytes=LIMIT, **settings) as served:
        assert refusal(lambda: served.score(request)).fields == ["logprobs"]
        responses = list(served.stub.ScoreStream(iter([pb.ScoreStreamRequest(id="a", request=request)])))
    parts = [response.part.next_logprobs for response in responses if response.part.next_logprobs]
    assert len(parts) > size * 4 // LIMIT
    assert max(response.ByteSize() for response in responses) <= LIMIT
    joined = [value for part in parts for value in part]
    assert len(joined) == size
    assert joined == list(whole.next.logprobs)


@pytest.mark.parametrize("allowed", [True, False])
def test_the_model_tells_whether_whole_distributions_are_allowed(allowed: bool, short: Served, tiny: Served) -> None:
    served = short if allowed else tiny
    assert served.stub.GetModel(pb.GetModelRequest()).allows_full_distribution == allowed


@pytest.mark.parametrize(
    ("fields", "field", "rule"),
    [
        pytest.param({}, "full_distribution", "needs next_token", id="of no next token"),
        pytest.param(
            {"next_token": True, "continuations": [ids([i % 300]) for i in range(1000)] * 4, "totals_only": True},
            "continuations",
            "4000 are more",
            id="too many",
        ),
    ],
)
def test_a_whole_distribution_has_rules(fields: dict[str, Any], field: str, rule: str, short: Served) -> None:
    request = pb.ScoreRequest(context=text("a"), full_distribution=True, **fields)
    refused = refusal(lambda: short.stub.Score(request))
    assert field in refused.fields
    assert rule in refused.violations[0][1]


def test_whole_distributions_cost_a_vocabulary_of_alternatives(tiny_folder: Path) -> None:
    with running(tiny_folder, allow_full_distribution=True, max_alternatives=900) as served:
        request: dict[str, Any] = {"next_token": True, "full_distribution": True}
        assert len(scored(served, text("a"), *[text("b")] * 3, **request)) == 3
        refused = refusal(lambda: scored(served, text("a"), *[text("b")] * 4, **request))
    assert refused.violations == [
        ("full_distribution", "4 positions with 300 alternatives each are more than this server's 900 alternatives")
    ]
