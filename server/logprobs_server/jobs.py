"""What the event loop hands to others: checks to a thread, jobs to the engine, whose events come back to it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Sequence
from functools import partial
from typing import Generic, TypeVar

from google.protobuf.message import Message

from logprobs_server.engine.events import Event, JobFailed, JobFinished
from logprobs_server.engine.types import Engine, EngineUnavailableError, Job, Sink, Ticket
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
"""Requests with no more than this to tokenise are checked on the event loop, others on another thread."""
_RETRY_S = 0.05
"""How long a patient job waits before it tries a full queue again."""

_Request = TypeVar("_Request", bound=Message)
_Plan = TypeVar("_Plan")
_Read = TypeVar("_Read")


async def checked(check: Callable[[_Request], _Plan], request: _Request, *, continuations: int = 0) -> _Plan:
    """What a check makes of a request.

    Args:
        continuations: its context may be tokenised again with each; 16 KB with 1,000 held up the loop for 3 s.
    """
    if request.ByteSize() * (1 + continuations) <= _INLINE_BYTES:
        return check(request)
    return await asyncio.to_thread(check, request)


async def run(
    engine: Engine,
    job: Job,
    read: Callable[[Sequence[Event]], Iterable[_Read]],
    write: Callable[[_Read], Awaitable[None]],
    *,
    patient: bool = False,
) -> None:
    """Writes what `read` makes of the events that wait, again and again until the job has finished; stopped early, it
    cancels the job.

    Args:
        engine: one that calls its sinks on this event loop.
        read: called where events come in if they are waited for, else when all before them is written.
        patient: waits while the queue is full.
    Raises:
        OverloadedError, NotReadyError: the engine takes no job. EngineFailedError: it could not do this one.
    """
    inbox = _Inbox(read)
    ticket = await _submitted(engine, job, inbox.put, patient)
    try:
        while not inbox.finished:
            for each in await inbox.take():
                await write(each)
    finally:
        engine.cancel(ticket)


class _Inbox(Generic[_Read]):
    """Events that wait for one reader. If that waits for them they are read where they come in, those of all streams in
    a row: messages of 16 streams took 44 us each between their sends, since to send one leaves nothing in the caches.
    """

    def __init__(self, read: Callable[[Sequence[Event]], Iterable[_Read]]) -> None:
        self._read = read
        self._events: list[Event] = []
        self._reader: asyncio.Future[Iterable[_Read]] | None = None
        self.finished = False

    def put(self, events: Sequence[Event]) -> None:
        """Takes what a step gave. Never raises: what `read` raises is the reader's."""
        self._events += events
        reader, self._reader = self._reader, None
        if reader is not None and not reader.done():  # it is if its task was cancelled
            try:
                reader.set_result(self._all())
            except Exception as error:
                reader.set_exception(error)

    async def take(self) -> Iterable[_Read]:
        """What there is, once there is something."""
        if self._events:
            return self._all()
        self._reader = asyncio.get_running_loop().create_future()
        return await self._reader

    def _all(self) -> Iterable[_Read]:
        events, self._events = self._events, []
        last = events[-1]
        if isinstance(last, JobFailed):
            raise _failure(last)
        self.finished = isinstance(last, JobFinished)
        return self._read(events)


async def scored(engine: Engine, builder: MessageBuilder, plan: ScorePlan, *, patient: bool = False) -> ScoreMessages:
    """Runs the jobs of a plan one after the other; what they gave becomes the answer's messages.

    Raises:
        As `run` does.
    """
    messages = ScoreMessages(builder, plan)

    async def push(number: int, event: Event) -> None:
        messages.push(number, event)

    for number, job in enumerate(plan.jobs):
        await run(engine, job, tuple, partial(push, number), patient=patient)
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


def _failure(event: JobFailed) -> ServiceError:
    if event.reason == "SHUTTING_DOWN":
        return NotReadyError("the server is shutting down", reason=event.reason)
    if event.reason == "MODEL_YIELDED_NAN":
        return EngineFailedError("the model yielded no distribution for a position", reason=event.reason)
    if event.reason == "NOTHING_TO_DRAW":
        rule = "bias and min_tokens leave nothing to draw, they mask all that the model holds possible"
        return InvalidRequestError([Violation("sampling", rule)], 0)
    return EngineFailedError("the engine failed")
