"""What a job gives reaches the one who reads it, whenever it comes in; what goes wrong reaches that one alone."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any, cast

import pytest
from logprobs_server.engine.events import Event, JobFailed, JobFinished, JobStarted
from logprobs_server.engine.types import Engine, Job, ModelDescription, Sink, Ticket
from logprobs_server.errors import EngineFailedError
from logprobs_server.jobs import run

STARTED = JobStarted(cached_token_count=0)
JOB = cast(Job, None)  # nobody looks at it


class Puppet:
    """Implements `Engine`: gives what the test says, and notes what was cancelled."""

    description: ModelDescription
    sink: Sink

    def __init__(self) -> None:
        self.cancelled: list[Ticket] = []

    def unfit(self, job: Job) -> str | None:
        """Takes any job."""
        return None

    def submit(self, job: Job, sink: Sink) -> Ticket:
        """Keeps the listener."""
        self.sink = sink
        return Ticket(job, sink)

    def cancel(self, ticket: Ticket) -> None:
        """Notes it."""
        self.cancelled.append(ticket)

    def close(self) -> None:
        """Nothing runs."""


async def collected(engine: Engine, read: Any) -> list[Any]:
    """All that is written of what the job gives."""
    written: list[Any] = []

    async def write(each: Any) -> None:
        written.append(each)

    await run(engine, JOB, read, write)
    return written


async def waiting(engine: Puppet, read: Any) -> asyncio.Task[list[Any]]:
    """A reader that waits for its first events."""
    task = asyncio.create_task(collected(engine, read))
    await asyncio.sleep(0)
    return task


async def test_events_that_are_waited_for_are_read_where_they_come_in() -> None:
    engine, read = Puppet(), []

    def note(events: Sequence[Event]) -> list[int]:
        read.append(list(events))
        return [len(read)]

    reader = await waiting(engine, note)
    engine.sink([STARTED])
    assert read == [[STARTED]]
    await asyncio.sleep(0)
    engine.sink([JobFinished()])
    assert await reader == [1, 2]
    assert len(engine.cancelled) == 1


async def test_events_that_nobody_waits_for_are_read_together() -> None:
    engine = Puppet()
    reader = await waiting(engine, lambda events: [list(events)])
    engine.sink([STARTED])
    engine.sink([STARTED])  # the reader has not gone on yet
    engine.sink([JobFinished()])
    assert await reader == [[STARTED], [STARTED, JobFinished()]]


@pytest.mark.parametrize("late", [False, True], ids=["waited for", "not waited for"])
async def test_an_error_in_reading_is_the_readers_and_ends_the_job(late: bool) -> None:
    engine = Puppet()

    def broken(events: Sequence[Event]) -> Sequence[Event]:
        if events != [STARTED]:
            raise ZeroDivisionError
        return events

    reader = await waiting(engine, broken)
    engine.sink([STARTED])
    if not late:
        await asyncio.sleep(0)
    engine.sink([JobFinished()])
    with pytest.raises(ZeroDivisionError):
        await reader
    assert len(engine.cancelled) == 1


async def test_a_reader_that_is_cancelled_ends_the_job_and_what_follows_harms_nobody() -> None:
    engine = Puppet()
    reader = await waiting(engine, list)
    reader.cancel()
    engine.sink([STARTED])
    with pytest.raises(asyncio.CancelledError):
        await reader
    engine.sink([JobFinished()])
    assert len(engine.cancelled) == 1


async def test_a_job_that_fails_raises_what_callers_are_told() -> None:
    engine = Puppet()
    reader = await waiting(engine, list)
    engine.sink([STARTED, JobFailed(reason="ENGINE_FAILED", detail="out of memory")])
    with pytest.raises(EngineFailedError):
        await reader
