"""The clients over a real socket: both give the same, errors are typed, and leaving a stream ends the call."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
import pytest
from google.protobuf import duration_pb2
from google.protobuf.message import Message
from google.rpc import error_details_pb2
from logprobs import (
    AsyncClient,
    CallError,
    Client,
    DeadlineExceededError,
    IncompleteStreamError,
    InconsistentStreamError,
    InternalError,
    InvalidRequestError,
    InvalidTextError,
    PermissionDeniedError,
    RequestCancelledError,
    ResourceExhaustedError,
    UnauthenticatedError,
    UnavailableError,
    UnimplementedError,
    Violation,
)
from logprobs.status import call_error
from logprobs.v1 import logprobs_pb2 as pb
from scripted import ScriptedServer, drawn, generation_events, status_with

COMPLETIONS = [drawn([b"a", b"b"], [-1.0, -2.0]), drawn([b"c"], [-0.5])]
EVENTS = generation_events(COMPLETIONS)

CALLS: list[Any] = [
    pytest.param(lambda c: c.score("Hi", ["x"], top=1), pb.ScoreRequest, id="score"),
    pytest.param(lambda c: c.tokenize("Hi"), pb.TokenizeRequest, id="tokenize"),
    pytest.param(lambda c: c.detokenize([72, 105]), pb.DetokenizeRequest, id="detokenize"),
    pytest.param(lambda c: c.model(), pb.GetModelRequest, id="model"),
    pytest.param(lambda c: c.generate("Hi", seed=3).collect(), pb.GenerateRequest, id="generate"),
]


@pytest.mark.parametrize(("call", "kind"), CALLS)
async def test_both_clients_send_and_give_the_same(
    server: ScriptedServer, call: Callable[[Any], Any], kind: type[Message]
) -> None:
    server.score.sequences.add(totals=pb.Totals(token_count=2))
    server.tokenized.tokens.add(id=3)
    server.told.model.name = "scripted"
    server.events = EVENTS
    with Client(server.target) as client:
        answer = call(client)
    async with AsyncClient(server.target) as async_client:
        assert await call(async_client) == answer
    sent, sent_again = server.requests
    assert isinstance(sent, kind)
    assert sent == sent_again


async def test_both_streams_give_every_event_in_order(server: ScriptedServer) -> None:
    server.events = EVENTS
    with Client(server.target) as client, client.generate("Hi") as stream:
        assert list(stream) == EVENTS
        assert [completion.text for completion in stream.collect().ranked] == ["c", "ab"]
    async with AsyncClient(server.target) as async_client, async_client.generate("Hi") as async_stream:
        assert [event async for event in async_stream] == EVENTS
        assert [completion.text for completion in (await async_stream.collect()).ranked] == ["c", "ab"]


async def test_a_stream_read_in_part_is_collected_whole(server: ScriptedServer) -> None:
    server.events = EVENTS
    with Client(server.target) as client, client.generate("Hi") as stream:
        next(stream)
        assert len(stream.generation.completions) == 0
        assert len(stream.collect().completions) == 2


def test_metadata_goes_with_every_call(server: ScriptedServer) -> None:
    server.events = EVENTS
    with Client(server.target, metadata=[("x-request-id", "mine")]) as client:
        client.model()
        client.generate("Hi").collect()
    assert [metadata["x-request-id"] for metadata in server.metadata] == ["mine", "mine"]


def test_a_text_that_cannot_be_sent_is_not_sent(server: ScriptedServer) -> None:
    with Client(server.target) as client, pytest.raises(InvalidTextError):
        client.generate("\udcff")
    assert server.requests == []


def test_an_answer_of_any_size_arrives(server: ScriptedServer) -> None:
    """Beyond gRPC's own limit of 4 MiB: the limit is the server's."""
    server.score.sequences.add().tokens.add(bytes=b"x" * (5 << 20))
    with Client(server.target) as client:
        assert client.score("Hi") == server.score


KINDS = {
    "CANCELLED": RequestCancelledError,
    "DEADLINE_EXCEEDED": DeadlineExceededError,
    "INTERNAL": InternalError,
    "INVALID_ARGUMENT": InvalidRequestError,
    "NOT_FOUND": CallError,
    "PERMISSION_DENIED": PermissionDeniedError,
    "RESOURCE_EXHAUSTED": ResourceExhaustedError,
    "UNAUTHENTICATED": UnauthenticatedError,
    "UNAVAILABLE": UnavailableError,
    "UNIMPLEMENTED": UnimplementedError,
}


@pytest.mark.parametrize(("status", "kind"), KINDS.items())
def test_each_status_has_its_error(server: ScriptedServer, status: str, kind: type[CallError]) -> None:
    server.failure = status_with(status, "no")
    with Client(server.target) as client, pytest.raises(CallError) as caught:
        client.score("Hi")
    assert type(caught.value) is kind
    assert (caught.value.status, caught.value.message) == (status, "no")


INVALID = status_with(
    "INVALID_ARGUMENT",
    "two rules",
    error_details_pb2.ErrorInfo(reason="INVALID_REQUEST", domain="logprobs", metadata={"request_id": "r1"}),
    error_details_pb2.RetryInfo(retry_delay=duration_pb2.Duration(seconds=1, nanos=500_000_000)),
    error_details_pb2.BadRequest(
        field_violations=[
            error_details_pb2.BadRequest.FieldViolation(field="sampling.top_p", description="1.5 is outside (0, 1]"),
            error_details_pb2.BadRequest.FieldViolation(field="max_tokens", description="-1 is below 0"),
        ]
    ),
)


def check_details(error: CallError) -> None:
    assert isinstance(error, InvalidRequestError)
    assert (error.message, error.reason, error.request_id) == ("two rules", "INVALID_REQUEST", "r1")
    assert error.violations == (
        Violation("sampling.top_p", "1.5 is outside (0, 1]"),
        Violation("max_tokens", "-1 is below 0"),
    )
    assert error.retry_after == 1.5


async def test_both_clients_decode_the_details_of_errors(server: ScriptedServer) -> None:
    server.failure = INVALID
    with Client(server.target) as client:
        for call in (lambda: client.score("Hi"), lambda: client.generate("Hi").collect()):
            with pytest.raises(CallError) as caught:
                call()
            check_details(caught.value)
    async with AsyncClient(server.target) as async_client:
        async_calls: list[Callable[[], Awaitable[Any]]] = [
            lambda: async_client.score("Hi"),
            lambda: async_client.generate("Hi").collect(),
        ]
        for async_call in async_calls:
            with pytest.raises(CallError) as caught:
                await async_call()
            check_details(caught.value)


def test_details_that_cannot_be_decoded_leave_the_status() -> None:
    trailers = grpc.aio.Metadata(("grpc-status-details-bin", b"\xff\xff"))
    broken = grpc.aio.AioRpcError(grpc.StatusCode.INTERNAL, grpc.aio.Metadata(), trailers, "broken")
    error = call_error(broken)
    assert (type(error), error.message, error.reason, error.violations) == (InternalError, "broken", "", ())


def test_a_server_that_is_not_there_is_unavailable() -> None:
    with Client("127.0.0.1:1") as client, pytest.raises(UnavailableError):
        client.model()


def test_grpc_tries_again_what_is_unavailable_for_a_moment(server: ScriptedServer) -> None:
    server.failure, server.failures_left = status_with("UNAVAILABLE", "full"), 1
    with Client(server.target) as client:
        client.score("Hi")
    assert len(server.requests) == 2


def test_a_stream_is_not_started_again_once_it_has_begun(server: ScriptedServer) -> None:
    server.events, server.failure = EVENTS[:2], status_with("UNAVAILABLE", "stopping")
    with Client(server.target) as client, pytest.raises(IncompleteStreamError):
        client.generate("Hi").collect()
    assert len(server.requests) == 1


def test_a_timeout_ends_a_call(server: ScriptedServer) -> None:
    server.hangs = True
    with Client(server.target, timeout=0.05) as client, pytest.raises(DeadlineExceededError):
        client.score("Hi")


async def test_a_broken_stream_raises_with_what_had_arrived(server: ScriptedServer) -> None:
    server.events, server.failure = EVENTS[:2], status_with("INTERNAL", "our fault")
    with Client(server.target) as client, pytest.raises(IncompleteStreamError) as caught:
        client.generate("Hi").collect()
    async with AsyncClient(server.target) as async_client:
        with pytest.raises(IncompleteStreamError) as caught_async:
            await async_client.generate("Hi").collect()
    for error in (caught.value, caught_async.value):
        assert [(completion.text, completion.finished) for completion in error.partial.completions] == [("ab", False)]
        assert isinstance(error.cause, InternalError)


async def test_a_stream_that_ends_early_with_ok_raises_too(server: ScriptedServer) -> None:
    server.events = EVENTS[:-1]
    with Client(server.target) as client, pytest.raises(IncompleteStreamError, match="a ranking") as caught:
        list(client.generate("Hi"))
    assert caught.value.cause is None
    async with AsyncClient(server.target) as async_client:
        with pytest.raises(IncompleteStreamError, match="a ranking"):
            [event async for event in async_client.generate("Hi")]


async def test_a_stream_that_breaks_the_contract_is_cancelled(server: ScriptedServer) -> None:
    server.events, server.hangs = [EVENTS[0], EVENTS[0]], True
    with Client(server.target) as client:
        with pytest.raises(InconsistentStreamError, match="second started"):
            client.generate("Hi").collect()
        assert server.left.wait(10)
    server.left.clear()
    async with AsyncClient(server.target) as async_client:
        with pytest.raises(InconsistentStreamError, match="second started"):
            await async_client.generate("Hi").collect()
        assert server.left.wait(10)


def test_leaving_a_stream_cancels_the_call(server: ScriptedServer) -> None:
    server.events, server.hangs = EVENTS[:1], True
    with Client(server.target) as client:
        with client.generate("Hi") as stream:
            next(stream)
        assert server.left.wait(10)


async def test_leaving_an_async_stream_cancels_the_call(server: ScriptedServer) -> None:
    server.events, server.hangs = EVENTS[:1], True
    async with AsyncClient(server.target) as client:
        async with client.generate("Hi") as stream:
            await anext(stream)
        assert server.left.wait(10)


async def test_reading_on_after_cancel_tells_so(server: ScriptedServer) -> None:
    server.events, server.hangs = EVENTS[:1], True
    with Client(server.target) as client, client.generate("Hi") as stream:
        next(stream)
        stream.cancel()
        with pytest.raises(IncompleteStreamError) as caught:
            stream.collect()
    assert isinstance(caught.value.cause, RequestCancelledError)
    server.left.clear()
    async with AsyncClient(server.target) as async_client, async_client.generate("Hi") as async_stream:
        await anext(async_stream)
        async_stream.cancel()
        with pytest.raises(IncompleteStreamError) as caught:
            await async_stream.collect()
    assert isinstance(caught.value.cause, RequestCancelledError)


async def test_a_cancelled_task_stays_cancelled(server: ScriptedServer) -> None:
    server.events, server.hangs = EVENTS[:1], True
    async with AsyncClient(server.target) as client:
        stream = client.generate("Hi")
        await anext(stream)
        task = asyncio.create_task(stream.collect())
        await asyncio.wait([task], timeout=0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert server.left.wait(10)


LIGHT = """
import sys, logprobs
heavy = {name.partition(".")[0] for name in sys.modules} & {"torch", "transformers", "numpy", "rich", "grpc_status"}
sys.exit(", ".join(heavy) or 0)
"""


def test_the_client_is_light() -> None:
    finished = subprocess.run([sys.executable, "-c", LIGHT], capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
