"""The service's methods: a request becomes a plan, the plan a job, the job's events messages. No torch, no policy."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from google.protobuf.message import Message
from logprobs.v1 import logprobs_pb2 as pb
from logprobs.v1.logprobs_pb2_grpc import LogprobsServiceServicer

from logprobs_server.engine.types import Engine, EngineUnavailableError, Event, Job, JobFailed, JobFinished
from logprobs_server.errors import (
    EngineFailedError,
    InvalidRequestError,
    NotReadyError,
    OverloadedError,
    UnimplementedError,
    Violation,
)
from logprobs_server.messages import GenerateMessages, MessageBuilder, ScoreMessages
from logprobs_server.validation import Validator

__all__ = ["LogprobsServicer", "Ready"]

_INLINE_BYTES = 16 << 10
"""Requests up to this size are checked and tokenised on the event loop, larger ones on another thread."""

_Request = TypeVar("_Request", bound=Message)
_Plan = TypeVar("_Plan")


@dataclass(frozen=True, slots=True, kw_only=True)
class Ready:
    """What a loaded model brings."""

    engine: Engine
    validator: Validator
    builder: MessageBuilder


class LogprobsServicer(LogprobsServiceServicer):
    """Implements the contract; answers UNAVAILABLE until `ready` is set."""

    def __init__(self) -> None:
        self.ready: Ready | None = None

    async def Score(self, request: pb.ScoreRequest, context: Any) -> pb.ScoreResponse:  # noqa: N802
        """Scores a context, or continuations of it."""
        ready = self._ready()
        plan = await _checked(ready.validator.score, request)
        messages = ScoreMessages(ready.builder, plan)
        async for events in _run(ready.engine, plan.job):
            for event in events:
                messages.push(event)
        return messages.response()

    def ScoreStream(self, request_iterator: Any, context: Any) -> AsyncIterator[pb.ScoreStreamResponse]:  # noqa: N802
        """Not served yet."""
        raise UnimplementedError("ScoreStream is not served yet")

    async def Generate(self, request: pb.GenerateRequest, context: Any) -> AsyncIterator[pb.GenerateResponse]:  # noqa: N802
        """Draws completions and streams their tokens as they decode."""
        ready = self._ready()
        plan = await _checked(partial(ready.validator.generate, received_s=time.monotonic()), request)
        messages = GenerateMessages(ready.builder, plan)
        async for events in _run(ready.engine, plan.job):
            for message in messages.push(events):
                yield message

    async def Tokenize(self, request: pb.TokenizeRequest, context: Any) -> pb.TokenizeResponse:  # noqa: N802
        """Turns text into tokens."""
        ready = self._ready()
        return ready.builder.tokenized(await _checked(ready.validator.tokenize, request))

    async def Detokenize(self, request: pb.DetokenizeRequest, context: Any) -> pb.DetokenizeResponse:  # noqa: N802
        """Turns token ids into text."""
        ready = self._ready()
        token_ids = await _checked(ready.validator.detokenize, request)
        return ready.builder.detokenized(token_ids, request.keep_special)

    async def GetModel(self, request: pb.GetModelRequest, context: Any) -> pb.GetModelResponse:  # noqa: N802
        """Tells which model is served."""
        ready = self._ready()
        ready.validator.model(request)
        return ready.builder.model()

    def _ready(self) -> Ready:
        if self.ready is None:
            raise NotReadyError("the model is loading")
        return self.ready


async def _checked(check: Callable[[_Request], _Plan], request: _Request) -> _Plan:
    if request.ByteSize() <= _INLINE_BYTES:
        return check(request)
    return await asyncio.to_thread(check, request)


async def _run(engine: Engine, job: Job) -> AsyncIterator[Sequence[Event]]:
    """Gives a job's events, all that wait at a time, until it has finished; left early, it cancels the job.

    Raises:
        OverloadedError, NotReadyError: the engine takes no job. EngineFailedError: it could not do this one.
    """
    loop = asyncio.get_running_loop()
    arrived: asyncio.Queue[Sequence[Event]] = asyncio.Queue()
    try:
        ticket = engine.submit(job, partial(_hand_over, loop, arrived))
    except EngineUnavailableError as error:
        kind = NotReadyError if error.retry_after_s is None else OverloadedError
        raise kind(str(error), reason=error.reason, retry_after_s=error.retry_after_s) from error
    try:
        while True:
            events = list(await arrived.get())
            while not arrived.empty():
                events += arrived.get_nowait()
            last = events[-1]
            if isinstance(last, JobFailed):
                raise _failure(last)
            yield events
            if isinstance(last, JobFinished):
                return
    finally:
        engine.cancel(ticket)


def _hand_over(
    loop: asyncio.AbstractEventLoop, arrived: asyncio.Queue[Sequence[Event]], events: Sequence[Event]
) -> None:
    """From the engine's thread to the event loop."""
    loop.call_soon_threadsafe(arrived.put_nowait, events)


def _failure(event: JobFailed) -> Exception:
    if event.reason == "SHUTTING_DOWN":
        return NotReadyError("the server is shutting down", reason=event.reason)
    if event.reason == "MODEL_YIELDED_NAN":
        return EngineFailedError("the model yielded no distribution for a position", reason=event.reason)
    if event.reason == "NOTHING_TO_DRAW":
        rule = "bias and min_tokens leave nothing to draw, they mask all that the model holds possible"
        return InvalidRequestError([Violation("sampling", rule)], 0)
    return EngineFailedError("the engine failed")
