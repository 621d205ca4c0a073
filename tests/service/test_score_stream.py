"""Many scorings over one stream: every request is answered, by its id, with what Score answers or with its error."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.rpc import code_pb2
from harness import SERVICE, Served, ids, refusal, running, text, wait_until
from logprobs.v1 import logprobs_pb2 as pb
from logprobs.v1.logprobs_pb2_grpc import LogprobsServiceStub
from logprobs_server import score_stream
from logprobs_server.engine.events import JobFailed, JobStarted
from logprobs_server.engine.types import Job, Sink, Ticket

LIMIT = 65_536
LONG = pb.ScoreRequest(context=text("ab"), continuations=[ids([i % 300] * 1500) for i in range(64)], totals_only=True)


def item(name: str, request: pb.ScoreRequest | None = None) -> pb.ScoreStreamRequest:
    return pb.ScoreStreamRequest(id=name, request=request or pb.ScoreRequest(context=text("the horse")))


def answers(served: Served, items: list[pb.ScoreStreamRequest]) -> dict[str, pb.ScoreStreamResponse]:
    """The last message about each request; parts are put into it."""
    parts: dict[str, list[pb.ScorePart]] = {}
    found: dict[str, pb.ScoreStreamResponse] = {}
    for response in served.stub.ScoreStream(iter(items)):
        assert response.id not in found
        if response.HasField("part"):
            parts.setdefault(response.id, []).append(response.part)
            continue
        for part in parts.get(response.id, []):
            sequence = response.response.sequences[part.sequence]
            sequence.tokens.extend(part.tokens)
            sequence.next.logprobs.extend(part.next_logprobs)
        found[response.id] = response
    return found


# what is answered


def test_every_request_is_answered_as_score_answers_it(tiny: Served) -> None:
    options = pb.LogprobOptions(top_count=3, entropy=True)
    requests = [
        pb.ScoreRequest(context=ids([5] * (1 + i)), continuations=[ids([i, 7])] * (i % 3), logprobs=options)
        for i in range(200)
    ]
    found = answers(tiny, [item(str(i), request) for i, request in enumerate(requests)])
    assert found.keys() == {str(i) for i in range(200)}
    for i in range(0, 200, 17):
        alone, streamed = tiny.stub.Score(requests[i]), found[str(i)].response
        assert streamed.model == alone.model
        assert streamed.usage.input_token_count == alone.usage.input_token_count
        for one, other in zip(alone.sequences, streamed.sequences, strict=True):
            assert [token.id for token in other.tokens] == [token.id for token in one.tokens]
            assert other.totals.logprob == pytest.approx(one.totals.logprob, abs=1e-3)


def test_no_requests_have_no_answers(tiny: Served) -> None:
    assert answers(tiny, []) == {}


def test_answers_come_as_they_finish(tiny: Served) -> None:
    twice = pb.ScoreRequest(context=text("a"), continuations=[ids([7] * 1000)], neutral_context=text("b"))
    call = tiny.stub.ScoreStream(iter([item("scored twice", twice), item("scored once")]))
    assert [response.id for response in call] == ["scored once", "scored twice"]


# errors of single requests


def test_a_request_that_breaks_rules_does_not_end_the_stream(tiny: Served) -> None:
    wrong = pb.ScoreRequest(context=ids([300]), logprobs=pb.LogprobOptions(top_count=-1))
    found = answers(tiny, [item("a"), item("b", wrong), item("c")])
    assert found["a"].HasField("response")
    assert found["c"].HasField("response")
    error = found["b"].error
    assert (error.code, error.reason) == (code_pb2.INVALID_ARGUMENT, "INVALID_REQUEST")
    assert [violation.field for violation in error.violations] == [
        "request.logprobs.top_count",
        "request.context.token_ids.ids[0]",
    ]
    assert "300 is outside" in error.violations[1].description
    assert error.message.startswith("request.logprobs.top_count: -1 is outside")
    assert not error.HasField("retry_after")


def test_a_request_tells_what_score_would_have_told_of_it(tiny: Served) -> None:
    wrong = pb.ScoreRequest(context=ids([300] * 30))
    error = answers(tiny, [item("a", wrong)])["a"].error
    refused = refusal(lambda: tiny.stub.Score(wrong))
    assert [(f"request.{field}", rule) for field, rule in refused.violations[:20]] == [
        (violation.field, violation.description) for violation in error.violations
    ]
    assert error.message == f"request.{refused.message}"


@pytest.mark.parametrize(
    ("name", "echoed", "rule"),
    [
        pytest.param("", "", "'' has 0 bytes, outside [1, 1024]", id="empty"),
        pytest.param("é" * 513, "é" * 512, "has 1026 bytes", id="too long"),
        pytest.param("x" * 1025, "x" * 1024, "has 1025 bytes", id="too long by one"),
    ],
)
def test_an_id_that_is_none_is_an_error_of_its_request(name: str, echoed: str, rule: str, tiny: Served) -> None:
    found = answers(tiny, [item(name), item("a")])
    assert found["a"].HasField("response")
    [violation] = found[echoed].error.violations
    assert violation.field == "id"
    assert rule in violation.description


def test_the_longest_id_is_one(tiny: Served) -> None:
    assert answers(tiny, [item("x" * 1024)])["x" * 1024].HasField("response")


def test_all_that_is_wrong_with_a_request_is_told_at_once(tiny: Served) -> None:
    error = answers(tiny, [item("", pb.ScoreRequest(totals_only=True, roll_stride=3))])[""].error
    assert [violation.field for violation in error.violations] == ["id", "request.roll_stride", "request.context"]


def test_an_id_may_be_used_again_once_it_is_answered_and_not_before(tiny: Served) -> None:
    answered = threading.Event()

    def requests() -> Iterator[pb.ScoreStreamRequest]:
        yield item("a", LONG)
        yield item("a")
        answered.wait()
        yield item("a")

    call = tiny.stub.ScoreStream(requests())
    error, answer = next(call), next(call)
    assert error.error.violations[0].field == "id"
    assert "'a' is that of a request in flight" in error.error.message
    assert len(answer.response.sequences) == 64
    answered.set()
    assert [len(response.response.sequences) for response in call] == [1]


def test_an_unknown_field_is_an_error_of_its_request(tiny: Served) -> None:
    data = item("a").SerializeToString() + b"\x98\x06\x01"  # field 99
    call: Any = tiny.channel.stream_stream(
        f"/{SERVICE}/ScoreStream", response_deserializer=pb.ScoreStreamResponse.FromString
    )
    responses = list(call(iter([data, item("b").SerializeToString()])))
    errors = {response.id: response.error for response in responses}
    assert [violation.field for violation in errors["a"].violations] == ["99"]
    assert not errors["b"].code


def test_bytes_that_are_no_message_end_the_stream(tiny: Served) -> None:
    call: Any = tiny.channel.stream_stream(f"/{SERVICE}/ScoreStream")
    refused = refusal(lambda: list(call(iter([b"\xff\xff\xff"]))))
    assert refused.code is grpc.StatusCode.INVALID_ARGUMENT
    assert refused.info.reason == "MALFORMED_REQUEST"


FAILURES = {
    "ENGINE_FAILED": (code_pb2.INTERNAL, "INTERNAL"),
    "MODEL_YIELDED_NAN": (code_pb2.INTERNAL, "MODEL_YIELDED_NAN"),
    "SHUTTING_DOWN": (code_pb2.UNAVAILABLE, "SHUTTING_DOWN"),
}


@pytest.mark.parametrize("reason", FAILURES)
def test_what_the_engine_fails_at_is_an_error_of_its_request(
    reason: str, tiny: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    submit = tiny.engine.submit

    def fails_with_one(job: Job, sink: Sink) -> Ticket:
        if job.prefix != (13, 13):  # type: ignore[union-attr]
            return submit(job, sink)
        sink([JobStarted(cached_token_count=0), JobFailed(reason=reason, detail="secret")])
        return Ticket(job, sink)

    monkeypatch.setattr(tiny.engine, "submit", fails_with_one)
    bad = pb.ScoreRequest(context=ids([13, 13]), continuations=[ids([1]), ids([2])])
    found = answers(tiny, [item("a"), item("b", bad), item("c")])
    assert found["a"].HasField("response")
    assert found["c"].HasField("response")
    error = found["b"].error
    assert (error.code, error.reason) == FAILURES[reason]
    assert "secret" not in str(error)


def test_an_error_nobody_foresaw_is_one_of_its_request(tiny: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    def raises(job: Job, sink: Sink) -> Ticket:
        raise RuntimeError("secret")

    monkeypatch.setattr(tiny.engine, "submit", raises)
    error = answers(tiny, [item("a")])["a"].error
    assert (error.code, error.reason) == (code_pb2.INTERNAL, "INTERNAL")
    assert "secret" not in str(error)


def test_a_full_queue_makes_requests_wait(tiny_folder: Path) -> None:
    with running(tiny_folder, max_queue=1, max_sequences=1) as served:
        under_way = served.stub.Generate(
            pb.GenerateRequest(prompt=text("ab"), max_tokens=400, stopping=pb.Stopping(ignore_eos=True))
        )
        assert next(under_way).HasField("started")
        found = answers(served, [item(str(i)) for i in range(30)])
        assert len(found) == 30
        assert all(response.HasField("response") for response in found.values())
        assert list(under_way)[-1].HasField("finished")


# large answers


@pytest.fixture(scope="module")
def small(tiny_folder: Path) -> Iterator[Served]:
    """A server with the smallest messages there can be."""
    with running(tiny_folder, max_response_bytes=LIMIT, allow_full_distribution=True) as served:
        yield served


def test_an_answer_too_large_for_one_message_comes_in_parts(small: Served) -> None:
    options = pb.LogprobOptions(top_count=50, token_ids=range(20))
    contexts = [[(i * j) % 300 for i in range(1, 900)] for j in (1, 7)]
    request = pb.ScoreRequest(
        context=ids([5]), continuations=[ids(context) for context in contexts], logprobs=options, next_token=True
    )
    responses = list(small.stub.ScoreStream(iter([item("a", request)])))
    assert max(response.ByteSize() for response in responses) <= LIMIT
    *parts, last = responses
    assert len(parts) > 20
    assert [part.part.sequence for part in parts] == sorted(part.part.sequence for part in parts)
    for index, (context, sequence) in enumerate(zip(contexts, last.response.sequences, strict=True)):
        tokens = [token for part in parts if part.part.sequence == index for token in part.part.tokens]
        assert not sequence.tokens
        assert [token.id for token in tokens] == context
        assert sequence.totals.token_count == len(context)
        assert sequence.totals.logprob == pytest.approx(sum(token.logprob for token in tokens), rel=1e-5)
        assert all(len(token.top) == 50 for token in tokens)
        assert len(sequence.next.top) == 50


def test_an_answer_that_fits_comes_whole(small: Served) -> None:
    [response] = small.stub.ScoreStream(iter([item("a")]))
    assert len(response.response.sequences[0].tokens) > 0


def test_what_the_last_message_could_not_hold_is_refused(small: Served) -> None:
    request = pb.ScoreRequest(
        context=ids([5]),
        continuations=[ids([])] * 1000,
        logprobs=pb.LogprobOptions(top_count=20),
        next_token=True,
    )
    [violation] = answers(small, [item("a", request)])["a"].error.violations
    assert violation.field == "request.logprobs"
    assert violation.description.endswith("this server's limit is 65,536")


# what is held at once


def test_no_more_is_scored_than_is_read(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers of a megabyte each to a reader that takes one, then waits."""
    monkeypatch.setattr(score_stream, "_MAX_IN_FLIGHT", 4)
    context = ids([i % 300 for i in range(600)])
    request = pb.ScoreRequest(context=context, logprobs=pb.LogprobOptions(top_count=100))
    options = [("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", LIMIT)]
    with running(tiny_folder) as served, grpc.insecure_channel(served.target, options) as channel:
        submit, submitted = served.engine.submit, []

        def counted(job: Job, sink: Sink) -> Ticket:
            submitted.append(job)
            return submit(job, sink)

        monkeypatch.setattr(served.engine, "submit", counted)
        call = LogprobsServiceStub(channel).ScoreStream(item(str(i), request) for i in range(100))
        first = next(call)
        wait_until(lambda: len(submitted) > 4)
        served.wait_until_idle()
        assert len(submitted) < 20
        assert len([first, *call]) == 100
        assert len(submitted) == 100


def test_answers_wait_for_room_by_their_size(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []

    class Watched(score_stream._Room):
        async def enter(self, size: int) -> None:
            await super().enter(size)
            sizes.append(self._bytes)
            assert self._count == 1 or self._bytes <= 100_000

    monkeypatch.setattr(score_stream, "_MAX_BYTES", 100_000)
    monkeypatch.setattr(score_stream, "_Room", Watched)
    requests = [pb.ScoreRequest(context=ids([5] * (1 + 97 * i % 1500))) for i in range(60)]
    with running(tiny_folder) as served:
        found = answers(served, [item(str(i), request) for i, request in enumerate(requests)])
    assert all(response.HasField("response") for response in found.values())
    assert len(sizes) == 60
    assert max(sizes) > 100_000  # the larger ones went alone


@pytest.mark.parametrize("way", ["cancelled", "expired", "disconnected"])
def test_a_stream_that_is_given_up_frees_everything(way: str, tiny_folder: Path) -> None:
    with running(tiny_folder) as served, grpc.insecure_channel(served.target) as channel:
        stub = LogprobsServiceStub(channel)
        call = stub.ScoreStream((item(str(i), LONG) for i in range(10_000)), timeout=1 if way == "expired" else None)
        wait_until(lambda: served.engine.num_free_blocks < served.engine.num_blocks)
        if way == "cancelled":
            call.cancel()
        elif way == "disconnected":
            channel.close()
        else:
            with pytest.raises(grpc.RpcError) as caught:
                list(call)
            assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        served.wait_until_idle()
        assert answers(served, [item("a")])["a"].HasField("response")
