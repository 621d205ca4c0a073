"""Generate's stream: which events come in which order, what ends a completion, and that every number adds up."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from harness import GREEDY, Served, Stream, ids, running, text, uniform
from logprobs.v1 import logprobs_pb2 as pb

EOS_ID, EOS_NAME = 0, "<|eos|>"
TOLERANCE = 1e-4
PROMPT = "The horse raced"
Scenario = tuple[Served, int, int]


def generation(**fields: Any) -> pb.GenerateRequest:
    """A request for eight greedy tokens, but for what is given."""
    return pb.GenerateRequest(**{"prompt": text(PROMPT), "max_tokens": 8, "sampling": GREEDY, **fields})


@pytest.fixture(scope="module")
def eos(tiny: Served) -> Scenario:
    """A seed with which a uniform draw ends with the end-of-sequence token, and the number of tokens until then."""
    request = generation(max_tokens=200, completion_count=16, sampling=uniform(0))
    stream = tiny.generate(request)
    seed, length = next((i, len(stream.token_ids(i))) for i in range(16) if 10 < len(stream.token_ids(i)) < 200)
    return tiny, seed, length


def until_eos(eos: Scenario, **stopping: Any) -> Stream:
    """That completion again, with these ways to stop."""
    served, seed, length = eos
    return served.generate(generation(max_tokens=length + 3, sampling=uniform(seed), stopping=pb.Stopping(**stopping)))


# events


def test_events_come_in_order_and_finish_once(tiny: Served) -> None:
    stream = tiny.generate(generation(prompt_logprobs=pb.LogprobOptions()))
    kinds = stream.kinds
    changes = [kind for before, kind in zip([None, *kinds], kinds, strict=False) if kind != before]
    assert changes == ["started", "prompt_scored", "decoded", "finished"]
    assert (kinds.count("started"), kinds.count("finished")) == (1, 1)


def test_several_completions_each_finish_once_and_are_ranked_last(tiny: Served) -> None:
    stream = tiny.generate(generation(completion_count=5, sampling=pb.Sampling(seed=3)))
    kinds = stream.kinds
    assert (kinds[0], kinds[-1]) == ("started", "ranked")
    assert (kinds.count("started"), kinds.count("finished"), kinds.count("ranked")) == (1, 5, 1)
    assert {i: len(stream.token_ids(i)) for i in range(5)} == dict.fromkeys(range(5), 8)


def test_nothing_follows_the_end_of_a_completion(tiny: Served) -> None:
    stream = tiny.generate(generation(max_tokens=60, completion_count=8, sampling=uniform(0)))
    ended: set[int] = set()
    for response in stream.responses:
        assert ended.isdisjoint(delta.completion for delta in response.decoded.deltas)
        if response.HasField("finished"):
            ended.add(response.finished.completion)
    assert ended == set(range(8))


def test_a_message_has_at_most_one_delta_of_a_completion(tiny: Served) -> None:
    stream = tiny.generate(generation(max_tokens=30, completion_count=8, sampling=uniform(0)))
    for response in stream.responses:
        completions = [delta.completion for delta in response.decoded.deltas]
        assert len(completions) == len(set(completions))


def test_one_completion_is_not_ranked(tiny: Served) -> None:
    assert "ranked" not in tiny.generate(generation(completion_count=1)).kinds


def test_the_start_tells_what_was_resolved(tiny: Served) -> None:
    started = tiny.generate(generation(completion_count=3, sampling=pb.Sampling(seed=9))).started
    assert (started.seed, started.completion_count) == (9, 3)
    assert started.prompt_token_count == len(tiny.stub.Tokenize(pb.TokenizeRequest(input=text(PROMPT))).tokens)
    assert started.cached_token_count == 0
    assert (started.model.name, started.model.dtype) == ("tiny", "float32")
    assert started.model.revision
    assert started.model == tiny.stub.GetModel(pb.GetModelRequest()).model


def test_a_drawn_seed_is_told_and_replays(tiny: Served) -> None:
    first, other = (tiny.generate(generation(sampling=pb.Sampling(temperature=1))) for _ in range(2))
    assert first.started.seed != other.started.seed
    assert 0 <= first.started.seed < 2**32
    replayed = tiny.generate(generation(sampling=pb.Sampling(temperature=1, seed=first.started.seed)))
    assert replayed.token_ids() == first.token_ids()


# the prompt


def test_a_scored_prompt_is_what_score_tells(tiny: Served) -> None:
    options = pb.LogprobOptions(top_count=3, token_ids=[7, 0], entropy=True)
    stream = tiny.generate(generation(prompt_logprobs=options))
    [sequence] = tiny.score(pb.ScoreRequest(context=text(PROMPT), logprobs=options))
    assert [t.id for t in stream.prompt_tokens] == [t.id for t in sequence.tokens]
    for token, scored in zip(stream.prompt_tokens, sequence.tokens, strict=True):
        assert (token.bytes, token.byte_offset, token.rank) == (scored.bytes, scored.byte_offset, scored.rank)
        assert token.logprob == pytest.approx(scored.logprob, abs=TOLERANCE)
        assert [a.id for a in token.named] == [a.id for a in scored.named]
        assert not token.HasField("sampling_logprob")


def test_the_prompts_first_token_has_no_logprob(tiny: Served) -> None:
    first, *rest = tiny.generate(generation(prompt_logprobs=pb.LogprobOptions(top_count=2))).prompt_tokens
    assert not any(first.HasField(name) for name in ("logprob", "rank", "tail_logprob"))
    assert not first.top
    assert all(token.HasField("logprob") and len(token.top) == 2 for token in rest)


def test_a_prompt_of_one_token_is_scored_too(tiny: Served) -> None:
    stream = tiny.generate(generation(prompt=ids([5]), prompt_logprobs=pb.LogprobOptions()))
    assert [token.id for token in stream.prompt_tokens] == [5]


def test_without_prompt_logprobs_the_prompt_is_not_told(tiny: Served) -> None:
    assert "prompt_scored" not in tiny.generate(generation()).kinds


def test_max_tokens_0_scores_the_prompt_and_finishes(tiny: Served) -> None:
    stream = tiny.generate(generation(max_tokens=0, prompt_logprobs=pb.LogprobOptions()))
    assert set(stream.kinds) == {"started", "prompt_scored", "finished"}
    assert stream.kinds[-1] == "finished"
    assert stream.finished().totals == pb.Totals(sampling_logprob=0.0)
    assert stream.finished().reason == pb.FINISH_REASON_MAX_TOKENS
    assert len(stream.prompt_tokens) == stream.started.prompt_token_count


# what ends a completion


def test_max_tokens_ends_a_completion(tiny: Served) -> None:
    stream = tiny.generate(generation(max_tokens=5))
    assert stream.finished().reason == pb.FINISH_REASON_MAX_TOKENS
    assert len(stream.tokens()) == 5
    assert stream.finished().WhichOneof("matched") is None


def test_a_full_context_ends_a_completion(tiny_folder: Path) -> None:
    with running(tiny_folder, context_length=16) as served:
        stream = served.generate(generation(prompt=ids([5] * 11), max_tokens=100))
        assert stream.finished().reason == pb.FINISH_REASON_CONTEXT_FULL
        assert len(stream.tokens()) == 5
        exact = served.generate(generation(prompt=ids([5] * 11), max_tokens=5))
        assert exact.finished().reason == pb.FINISH_REASON_MAX_TOKENS


def test_the_end_of_sequence_ends_a_completion(eos: Scenario) -> None:
    stream = until_eos(eos)
    assert stream.finished().reason == pb.FINISH_REASON_END_OF_SEQUENCE
    assert stream.finished().WhichOneof("matched") is None
    last = stream.tokens()[-1]
    assert (last.id, last.special, last.special_name, last.bytes) == (EOS_ID, True, EOS_NAME, b"")
    assert last.HasField("logprob")
    assert EOS_NAME not in stream.text()


def test_the_end_of_sequence_is_spelled_if_the_stop_is_kept(eos: Scenario) -> None:
    stream = until_eos(eos, include=True)
    assert stream.tokens()[-1].bytes == EOS_NAME.encode()
    assert stream.text() == until_eos(eos).text() + EOS_NAME
    assert not stream.tokens()[-1].trimmed


def test_an_ignored_end_of_sequence_ends_nothing(eos: Scenario) -> None:
    stream, (_, _, length) = until_eos(eos, ignore_eos=True), eos
    assert stream.token_ids()[length - 1] == EOS_ID
    assert len(stream.tokens()) == length + 3
    assert stream.finished().reason == pb.FINISH_REASON_MAX_TOKENS
    assert stream.tokens()[length - 1].bytes == b""


def test_until_min_tokens_no_end_of_sequence_is_drawn(eos: Scenario) -> None:
    plain, (_, _, length) = until_eos(eos), eos
    stream = until_eos(eos, min_tokens=length)
    assert stream.token_ids()[: length - 1] == plain.token_ids()[:-1]
    assert stream.token_ids()[length - 1] != EOS_ID
    assert [t.sampling_set_size for t in stream.tokens()] == [299] * length + [300] * (len(stream.tokens()) - length)


def test_min_tokens_reached_lets_the_end_of_sequence_come(eos: Scenario) -> None:
    plain, (_, _, length) = until_eos(eos), eos
    assert until_eos(eos, min_tokens=length - 1).token_ids() == plain.token_ids()


def test_a_stop_token_ends_a_completion_and_is_told(tiny: Served) -> None:
    plain = tiny.generate(generation(max_tokens=20))
    stop = plain.token_ids()[6]
    length = plain.token_ids().index(stop) + 1
    for include in (False, True):
        stream = tiny.generate(generation(max_tokens=20, stopping=pb.Stopping(token_ids=[299, stop], include=include)))
        finished = stream.finished()
        assert (finished.reason, finished.stop_token_id) == (pb.FINISH_REASON_STOP_TOKEN, stop)
        assert stream.token_ids() == plain.token_ids()[:length]
        assert stream.tokens()[-1].bytes == (plain.tokens()[length - 1].bytes if include else b"")
        assert stream.tokens()[-1].trimmed is not include
        assert stream.finished().totals.logprob == pytest.approx(
            sum(token.logprob for token in plain.tokens()[:length]), abs=TOLERANCE
        )


def stops(plain: Stream) -> tuple[str, int]:
    """A stop string of two characters that begins in one token and ends in the next, and the token it ends in."""
    tokens = plain.tokens()
    for index in range(3, len(tokens) - 1):
        both = tokens[index].bytes[-1:] + tokens[index + 1].bytes[:1]
        if both.isascii() and plain.text().index(both.decode()) == len(
            b"".join(token.bytes for token in tokens[: index + 1])[:-1].decode(errors="replace")
        ):
            return both.decode(), index + 1
    raise AssertionError("no such string")


@pytest.fixture(scope="module")
def stopped(tiny: Served) -> tuple[Served, Stream, pb.GenerateRequest, str, int]:
    """A completion, its request, and a string in it that begins in one token and ends in the next."""
    request = generation(max_tokens=60)
    plain = tiny.generate(request)
    return tiny, plain, request, *stops(plain)


def test_a_stop_string_ends_a_completion_and_is_cut(stopped: tuple[Served, Stream, Any, str, int]) -> None:
    tiny, plain, request, stop, last = stopped
    request.stopping.CopyFrom(pb.Stopping(strings=["\x00\x00", stop]))
    stream = tiny.generate(request)
    assert (stream.finished().reason, stream.finished().stop_string) == (pb.FINISH_REASON_STOP_STRING, stop)
    assert stream.token_ids() == plain.token_ids()[: last + 1]
    assert stream.text() == plain.text().partition(stop)[0]
    assert stream.bytes().decode(errors="replace") == stream.text()
    assert [token.trimmed for token in stream.tokens()[-2:]] == [True, True]
    assert stream.finished().totals.byte_count == len(stream.bytes())


def test_a_stop_string_is_kept_if_asked_for(stopped: tuple[Served, Stream, Any, str, int]) -> None:
    tiny, plain, request, stop, last = stopped
    request.stopping.CopyFrom(pb.Stopping(strings=[stop], include=True))
    stream = tiny.generate(request)
    assert stream.text() == plain.text().partition(stop)[0] + stop
    assert stream.token_ids() == plain.token_ids()[: last + 1]
    assert not stream.tokens()[-2].trimmed
    assert stream.bytes().decode(errors="replace") == stream.text()


def test_until_min_tokens_no_stop_string_is_looked_for(stopped: tuple[Served, Stream, Any, str, int]) -> None:
    tiny, plain, request, stop, last = stopped
    request.stopping.CopyFrom(pb.Stopping(strings=[stop], min_tokens=last + 1))
    stream = tiny.generate(request)
    assert stream.token_ids()[: last + 2] == plain.token_ids()[: last + 2]
    assert stop in stream.text()


# numbers

KINDS: dict[str, Callable[[], pb.GenerateRequest]] = {
    "greedy": generation,
    "sampled": lambda: generation(sampling=pb.Sampling(temperature=0.8, top_k=40, seed=4), completion_count=3),
    "uniform": lambda: generation(sampling=uniform(0), completion_count=16, max_tokens=100),
    "stopped": lambda: generation(stopping=pb.Stopping(strings=["a", "e"]), sampling=uniform(5), max_tokens=100),
}


@pytest.mark.parametrize("kind", KINDS)
def test_totals_are_the_sums_of_the_tokens(kind: str, tiny: Served) -> None:
    request = KINDS[kind]()
    stream = tiny.generate(request)
    for i in range(max(request.completion_count, 1)):
        tokens, totals = stream.tokens(i), stream.finished(i).totals
        assert totals.token_count == len(tokens)
        assert totals.byte_count == len(stream.bytes(i))
        assert totals.logprob == pytest.approx(math.fsum(token.logprob for token in tokens), rel=1e-6)
        sampling = math.fsum(token.sampling_logprob for token in tokens)
        assert totals.sampling_logprob == pytest.approx(sampling, rel=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_offsets_are_those_of_the_bytes_before(kind: str, tiny: Served) -> None:
    request = KINDS[kind]()
    stream = tiny.generate(request)
    for i in range(max(request.completion_count, 1)):
        before = b""
        for token in stream.tokens(i):
            assert token.byte_offset == len(before)
            before += token.bytes


def test_greedy_tokens_were_drawn_from_a_point(tiny: Served) -> None:
    tokens = tiny.generate(generation()).tokens()
    assert {(token.sampling_logprob, token.sampling_set_size, token.rank) for token in tokens} == {(0.0, 1, 1)}


def test_drawn_tokens_tell_both_numbers(tiny: Served) -> None:
    tokens = tiny.generate(generation(sampling=pb.Sampling(temperature=0.5, top_k=7, seed=1))).tokens()
    assert all(token.sampling_set_size == 7 and token.rank <= 7 for token in tokens)
    assert any(abs(token.sampling_logprob - token.logprob) > 0.01 for token in tokens)


def test_alternatives_are_what_was_asked_for(tiny: Served) -> None:
    options = pb.LogprobOptions(top_count=4, token_ids=[9, 3, 9], entropy=True)
    for token in tiny.generate(generation(sampling=uniform(2), logprobs=options)).tokens():
        assert [alternative.id for alternative in token.named] == [9, 3, 9]
        values = [alternative.logprob for alternative in token.top]
        assert len({alternative.id for alternative in token.top}) == 4
        assert values == sorted(values, reverse=True)
        assert math.fsum(map(math.exp, values)) + math.exp(token.tail_logprob) == pytest.approx(1, abs=1e-5)
        assert token.entropy > 0


def test_nothing_is_told_that_was_not_asked_for(tiny: Served) -> None:
    for token in tiny.generate(generation()).tokens():
        assert not token.top
        assert not token.named
        assert not token.HasField("tail_logprob")
        assert not token.HasField("entropy")


# ranking

CRITERIA: dict[str, tuple[pb.Ranking | None, Any, Callable[[pb.Totals], float]]] = {
    "default": (None, pb.RANKING_CRITERION_MEAN_LOGPROB, lambda t: t.logprob / t.token_count),
    "mean": (
        pb.Ranking(criterion=pb.RANKING_CRITERION_MEAN_LOGPROB),
        pb.RANKING_CRITERION_MEAN_LOGPROB,
        lambda t: t.logprob / t.token_count,
    ),
    "total": (
        pb.Ranking(criterion=pb.RANKING_CRITERION_TOTAL_LOGPROB),
        pb.RANKING_CRITERION_TOTAL_LOGPROB,
        lambda t: t.logprob,
    ),
    "normalized by default": (
        pb.Ranking(criterion=pb.RANKING_CRITERION_LENGTH_NORMALIZED),
        pb.RANKING_CRITERION_LENGTH_NORMALIZED,
        lambda t: t.logprob / t.token_count,
    ),
    "normalized": (
        pb.Ranking(criterion=pb.RANKING_CRITERION_LENGTH_NORMALIZED, length_exponent=0.5),
        pb.RANKING_CRITERION_LENGTH_NORMALIZED,
        lambda t: t.logprob / math.sqrt(t.token_count),
    ),
    "longer is better": (
        pb.Ranking(criterion=pb.RANKING_CRITERION_LENGTH_NORMALIZED, length_exponent=2),
        pb.RANKING_CRITERION_LENGTH_NORMALIZED,
        lambda t: t.logprob / t.token_count**2,
    ),
}


@pytest.mark.parametrize("name", CRITERIA)
def test_every_draw_is_ranked_best_first(name: str, tiny: Served) -> None:
    given, criterion, value = CRITERIA[name]
    stopping = pb.Stopping(token_ids=range(1, 60))  # so that lengths differ
    stream = tiny.generate(
        generation(completion_count=8, max_tokens=40, sampling=uniform(1), stopping=stopping, ranking=given)
    )
    totals = {i: stream.finished(i).totals for i in range(8)}
    assert len({total.token_count for total in totals.values()}) > 2
    expected = sorted(totals, key=lambda i: -value(totals[i]))
    assert stream.ranked.criterion == criterion
    assert [one.completion for one in stream.ranked.completions] == expected
    for one in stream.ranked.completions:
        assert one.value == pytest.approx(value(totals[one.completion]))
        assert one.totals == totals[one.completion]
