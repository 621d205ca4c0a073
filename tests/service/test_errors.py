"""What callers are told when a call fails, whoever's fault it is, and the id that every call has."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import grpc
import pytest
from harness import SERVICE, Refusal, Served, answer, refusal, running, text, wait_until
from logprobs.v1 import logprobs_pb2 as pb
from logprobs_server.engine.events import Event, JobFailed, JobStarted
from logprobs_server.engine.types import Job, Sink, Ticket
from logprobs_server.interceptor import _Call

SECRET = "secret of the engine"
SCORE = pb.ScoreRequest(context=text("ab"))
GENERATE = pb.GenerateRequest(prompt=text("ab"), max_tokens=2)
INVALID = pb.ScoreRequest()
LONG = pb.GenerateRequest(prompt=text("ab"), max_tokens=2000, stopping=pb.Stopping(ignore_eos=True))
REQUEST_ID = "x-request-id"


@pytest.fixture(params=[SCORE, GENERATE], ids=["Score", "Generate"])
def request_(request: pytest.FixtureRequest) -> Any:
    """A request that the engine is needed for."""
    return request.param


def ends_with(*events: Event) -> Callable[[Job, Sink], Ticket]:
    """A way to submit jobs that all end alike."""

    def submit(job: Job, sink: Sink) -> Ticket:
        sink(events)
        return Ticket(job, sink)

    return submit


def test_a_method_that_does_not_exist_is_not_implemented(tiny: Served) -> None:
    call: Any = tiny.channel.unary_unary(f"/{SERVICE}/Predict")
    with pytest.raises(grpc.RpcError) as caught:
        call(b"")
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


def test_a_failed_engine_is_internal_and_tells_nothing_of_its_insides(
    request_: Any, tiny: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    failed = ends_with(JobStarted(cached_token_count=0), JobFailed(reason="ENGINE_FAILED", detail=SECRET))
    monkeypatch.setattr(tiny.engine, "submit", failed)
    _check_internal(refusal(lambda: answer(tiny, request_)), "INTERNAL")


def test_an_error_nobody_foresaw_is_internal_and_tells_nothing_of_our_insides(
    request_: Any, tiny: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    def submit(job: Job, sink: Sink) -> Ticket:
        raise RuntimeError(SECRET)

    monkeypatch.setattr(tiny.engine, "submit", submit)
    refused = refusal(lambda: answer(tiny, request_))
    _check_internal(refused, "INTERNAL")
    assert refused.info.metadata["request_id"] in refused.message


def _check_internal(refused: Refusal, reason: str) -> None:
    assert refused.code is grpc.StatusCode.INTERNAL
    assert (refused.info.domain, refused.info.reason) == ("logprobs", reason)
    assert refused.info.metadata["request_id"]
    assert SECRET not in str(refused)
    assert "Error" not in str(refused)


def test_a_model_that_yields_no_distribution_is_internal_with_a_reason_of_its_own(
    request_: Any, tiny: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiny.engine, "submit", ends_with(JobFailed(reason="MODEL_YIELDED_NAN", detail=SECRET)))
    _check_internal(refusal(lambda: answer(tiny, request_)), "MODEL_YIELDED_NAN")


def test_nothing_to_draw_is_the_requests_fault(tiny: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiny.engine, "submit", ends_with(JobFailed(reason="NOTHING_TO_DRAW", detail=SECRET)))
    refused = refusal(lambda: answer(tiny, GENERATE))
    assert refused.code is grpc.StatusCode.INVALID_ARGUMENT
    assert refused.fields == ["sampling"]
    assert "leave nothing to draw" in refused.message
    assert SECRET not in refused.message


def test_an_engine_that_shuts_down_makes_the_service_unavailable(
    request_: Any, tiny: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiny.engine, "submit", ends_with(JobFailed(reason="SHUTTING_DOWN", detail=SECRET)))
    refused = refusal(lambda: answer(tiny, request_))
    assert refused.code is grpc.StatusCode.UNAVAILABLE
    assert (refused.info.reason, refused.retry_s) == ("SHUTTING_DOWN", None)


def test_a_full_queue_tells_when_to_try_again(tiny_folder: Path) -> None:
    with running(tiny_folder, max_queue=1, max_sequences=1) as served:
        under_way = served.stub.Generate(LONG)
        assert next(under_way).HasField("started")
        waiting = [served.stub.Score.future(SCORE) for _ in range(2)]  # one too many
        wait_until(lambda: any(call.done() for call in waiting))
        [refused] = [refusal(call.result) for call in waiting if call.done()]
        assert refused.code is grpc.StatusCode.UNAVAILABLE
        assert (refused.info.domain, refused.info.reason) == ("logprobs", "QUEUE_FULL")
        assert refused.retry_s == 1.0
        under_way.cancel()
        [waited] = [call for call in waiting if not call.done() or call.code() is grpc.StatusCode.OK]
        assert waited.result().sequences


Metadata = Sequence[tuple[str, str]]


def ids_of_answer(served: Served, request: Any, metadata: Metadata) -> list[Any]:
    """The request ids in the initial metadata of an answer."""
    name = type(request).__name__.removesuffix("Request")
    method = getattr(served.stub, name)
    call = method(request, metadata=metadata) if name == "Generate" else method.future(request, metadata=metadata)
    return [value for key, value in call.initial_metadata() if key == REQUEST_ID]


EVERY_REQUEST = {
    "Score": SCORE,
    "Generate": GENERATE,
    "Tokenize": pb.TokenizeRequest(input=text("a")),
    "Detokenize": pb.DetokenizeRequest(token_ids=[1]),
    "GetModel": pb.GetModelRequest(),
    "refused Score": INVALID,
    "refused Generate": pb.GenerateRequest(),
}


@pytest.mark.parametrize("name", EVERY_REQUEST)
def test_the_callers_request_id_comes_back(name: str, tiny: Served) -> None:
    assert ids_of_answer(tiny, EVERY_REQUEST[name], [(REQUEST_ID, "mine-1")]) == ["mine-1"]


@pytest.mark.parametrize("name", EVERY_REQUEST)
def test_a_call_without_request_id_gets_one(name: str, tiny: Served) -> None:
    first, second = (ids_of_answer(tiny, EVERY_REQUEST[name], [])[0] for _ in range(2))
    assert re.fullmatch("[0-9a-f]{32}", first)
    assert first != second


@pytest.mark.parametrize("sound", ["a", "~!", "x" * 128])
def test_a_sound_request_id_is_kept(sound: str, tiny: Served) -> None:
    assert ids_of_answer(tiny, SCORE, [(REQUEST_ID, sound)]) == [sound]


@pytest.mark.parametrize("bad", ["", "two words", "x" * 129], ids=["empty", "a space", "too long"])
def test_a_bad_request_id_is_replaced(bad: str, tiny: Served) -> None:
    [given] = ids_of_answer(tiny, SCORE, [(REQUEST_ID, bad)])
    assert re.fullmatch("[0-9a-f]{32}", given)


def test_errors_tell_the_request_id_too(tiny: Served) -> None:
    refused = refusal(lambda: tiny.stub.Score(INVALID, metadata=((REQUEST_ID, "mine-2"),)))
    assert refused.info.metadata["request_id"] == "mine-2"


class CannotSend:
    """A context through which nothing can be sent; if the caller has gone, the task is cancelled next, as gRPC does."""

    def __init__(self, *, gone: bool) -> None:
        self._gone = gone
        self.codes: list[grpc.StatusCode] = []

    def invocation_metadata(self) -> tuple[()]:
        return ()

    async def send_initial_metadata(self, metadata: object) -> None:
        task = asyncio.current_task()
        assert task is not None
        if self._gone:
            asyncio.get_running_loop().call_soon(task.cancel)
        raise grpc.aio.InternalError(SECRET)

    async def abort_with_status(self, status: Any) -> None:
        assert SECRET not in str(status)
        self.codes.append(status.code)


async def scored_through(context: Any) -> None:
    """Answers one call, which fails."""

    async def behaviour(request: Any, context: Any) -> pb.ScoreResponse:
        return pb.ScoreResponse()

    with pytest.raises(grpc.aio.InternalError):
        await _Call("Score", grpc.unary_unary_rpc_method_handler(behaviour)).unary(SCORE, context)


async def test_a_caller_that_goes_before_it_is_answered_is_no_error_of_ours(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    context = CannotSend(gone=True)
    await scored_through(context)
    assert [(record.levelname, record.message.split()[1]) for record in caplog.records] == [("INFO", "CANCELLED")]
    assert not context.codes


async def test_what_cannot_be_sent_to_a_caller_who_is_there_is_an_error_of_ours(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("logprobs_server.interceptor._PATIENCE_S", 0)
    caplog.set_level("INFO")
    context = CannotSend(gone=False)
    await scored_through(context)
    logged = [(record.levelname, record.message.split()[1]) for record in caplog.records]
    assert logged == [("ERROR", "failed,"), ("INFO", "INTERNAL")]
    assert context.codes == [grpc.StatusCode.INTERNAL]
