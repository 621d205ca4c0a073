"""What the event loop hands to others: checks to a thread, jobs to the engine, whose events come back to it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from functools import partial
from typing import TypeVar

from google.protobuf.message import Message

from logprobs_server.engine.types import (
    Engine,
    EngineUnavailableError,
    Event,
    Job,
    JobFailed,
    JobFinished,
    Sink,
    Ticket,
)
from logprobs_server.errors import (
    EngineFailedError,
    InvalidRequestError,
    NotReadyError,
    OverloadedError,
    ServiceError,
    Violation,
)
from logprobs_server.messages import MessageBuilder
from logprobs_server.requests import ScorePlan
from logprobs_server.score_messages import ScoreMessages

__all__ = ["checked", "run", "scored"]

_INLINE_BYTES = 16 << 10
"""Requests up to this size are checked and tokenised on the event loop, larger ones on another thread."""
_RETRY_S = 0.05
"""How long a patient job waits before it tries a full queue again."""

_Request = TypeVar("_Request", bound=Message)
_Plan = TypeVar("_Plan")


async def checked(check: Callable[[_Request], _Plan], request: _Request) -> _Plan:
    """What a check makes of a request."""
    if request.ByteSize() <= _INLINE_BYTES:
        return check(request)
    return await asyncio.to_thread(check, request)


async def run(engine: Engine, job: Job, *, patient: bool = False) -> AsyncIterator[Sequence[Event]]:
    """Gives a job's events, all that wait at a time, until it has finished; left early, it cancels the job.

    Args:
        patient: waits while the queue is full.
    Raises:
        OverloadedError, NotReadyError: the engine takes no job. EngineFailedError: it could not do this one.
    """
    loop = asyncio.get_running_loop()
    arrived: asyncio.Queue[Sequence[Event]] = asyncio.Queue()
    ticket = await _submitted(engine, job, partial(_hand_over, loop, arrived), patient)
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


async def scored(engine: Engine, builder: MessageBuilder, plan: ScorePlan, *, patient: bool = False) -> ScoreMessages:
    """Runs the jobs of a plan one after the other; what they gave becomes the answer's messages.

    Raises:
        As `run` does.
    """
    messages = ScoreMessages(builder, plan)
    for number, job in enumerate(plan.jobs):
        async for events in run(engine, job, patient=patient):
            for event in events:
                messages.push(number, event)
    return messages


async def _submitted(engine: Engine, job: Job, sink: Sink, patient: bool) -> Ticket:
    while True:
        try:
            return engine.submit(job, sink)
        except EngineUnavailableError as error:
            if error.retry_after_s is None:
                raise NotReadyError(str(error), reason=error.reason) from error
            if not patient:
                raise OverloadedError(str(error), reason=error.reason, retry_after_s=error.retry_after_s) from error
        await asyncio.sleep(_RETRY_S)


def _hand_over(
    loop: asyncio.AbstractEventLoop, arrived: asyncio.Queue[Sequence[Event]], events: Sequence[Event]
) -> None:
    """From the engine's thread to the event loop."""
    loop.call_soon_threadsafe(arrived.put_nowait, events)


def _failure(event: JobFailed) -> ServiceError:
    if event.reason == "SHUTTING_DOWN":
        return NotReadyError("the server is shutting down", reason=event.reason)
    if event.reason == "MODEL_YIELDED_NAN":
        return EngineFailedError("the model yielded no distribution for a position", reason=event.reason)
    if event.reason == "NOTHING_TO_DRAW":
        rule = "bias and min_tokens leave nothing to draw, they mask all that the model holds possible"
        return InvalidRequestError([Violation("sampling", rule)], 0)
    return EngineFailedError("the engine failed")
