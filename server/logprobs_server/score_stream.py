"""Many scorings over one stream: answers as they finish, each matched by the caller's id, errors among them.

What is under way is bounded: no request is read while too many wait to be scored or, scored, to be sent, so a caller
that sends faster than it reads is held up by the connection itself. Knows nothing of gRPC.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Iterable
from dataclasses import dataclass

from logprobs.v1 import logprobs_pb2 as pb

from logprobs_server.engine.types import Engine
from logprobs_server.errors import EngineFailedError, InvalidRequestError, ServiceError, Violation, shown
from logprobs_server.jobs import checked, scored
from logprobs_server.messages import MessageBuilder
from logprobs_server.requests import MAX_ITEM_ID_BYTES, ScorePlan
from logprobs_server.score_messages import item_error
from logprobs_server.validation import Validator

__all__ = ["ScoreStream"]

_log = logging.getLogger(__name__)

_MAX_IN_FLIGHT = 64
_MAX_BYTES = 64 << 20
"""Requests under way at once, and what they and their answers may come to; a single one may be larger."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Answer:
    """An answer that waits to be sent: the messages are built when they are. `claimed`: the id is this request's."""

    id: str
    claimed: bool
    size: int
    messages: Iterable[pb.ScoreStreamResponse]


class ScoreStream:
    """One call of ScoreStream."""

    def __init__(self, engine: Engine, validator: Validator, builder: MessageBuilder) -> None:
        self._engine = engine
        self._validator = validator
        self._builder = builder
        self._room = _Room(_MAX_IN_FLIGHT, _MAX_BYTES)
        self._ids: set[str] = set()
        self._scoring: set[asyncio.Task[None]] = set()
        self._answers: asyncio.Queue[_Answer | None] = asyncio.Queue()  # no longer than the room allows

    async def answers(
        self, requests: AsyncIterator[pb.ScoreStreamRequest]
    ) -> AsyncGenerator[pb.ScoreStreamResponse, None]:
        """Answers all requests; closed early, it forgets those under way.

        Raises:
            What reading the requests raises.
        """
        reading = asyncio.create_task(self._read(requests))
        try:
            while (answer := await self._answers.get()) is not None:
                for message in answer.messages:
                    if answer.claimed and not message.HasField("part"):
                        self._ids.discard(answer.id)  # who has read this message may use the id again
                    yield message
                self._room.leave(answer.size)
            await reading
        finally:
            for task in (reading, *self._scoring):
                task.cancel()

    async def _read(self, requests: AsyncIterator[pb.ScoreStreamRequest]) -> None:
        try:
            async for request in requests:
                await self._begin(request)
            if self._scoring:
                await asyncio.wait(self._scoring)
        finally:
            self._answers.put_nowait(None)

    async def _begin(self, request: pb.ScoreStreamRequest) -> None:
        """Starts to score a request, or answers it with its error, once there is room."""
        item_id, size = request.id.encode()[:MAX_ITEM_ID_BYTES].decode(errors="ignore"), request.ByteSize()
        try:
            count = len(request.request.continuations)
            plan = await checked(self._validator.score_item, request, continuations=count)
            if item_id in self._ids:
                raise InvalidRequestError([Violation("id", f"{shown(item_id)} is that of a request in flight")], 0)
        except Exception as error:  # one that fails does not end the stream
            await self._room.enter(size)
            self._answer(item_id, size, [_failed(item_id, error)], claimed=False)
            return
        size += plan.size_bound
        await self._room.enter(size)
        self._ids.add(item_id)
        task = asyncio.create_task(self._score(item_id, size, plan))
        self._scoring.add(task)
        task.add_done_callback(self._scoring.discard)

    async def _score(self, item_id: str, size: int, plan: ScorePlan) -> None:
        try:
            messages = await scored(self._engine, self._builder, plan, patient=True)
        except Exception as error:
            self._answer(item_id, size, [_failed(item_id, error)], claimed=True)
        else:
            self._answer(item_id, size, messages.streamed(item_id), claimed=True)

    def _answer(self, item_id: str, size: int, messages: Iterable[pb.ScoreStreamResponse], *, claimed: bool) -> None:
        self._answers.put_nowait(_Answer(id=item_id, claimed=claimed, size=size, messages=messages))


def _failed(item_id: str, error: Exception) -> pb.ScoreStreamResponse:
    if not isinstance(error, ServiceError):
        _log.error("a request of a stream failed, its id %s", shown(item_id), exc_info=error)
        error = EngineFailedError(f"internal error; our log has it under the id {shown(item_id)}")
    return pb.ScoreStreamResponse(id=item_id, error=item_error(error))


class _Room:
    """Counts what is under way. One task at a time may wait to enter."""

    def __init__(self, most: int, most_bytes: int) -> None:
        self._most = most
        self._most_bytes = most_bytes
        self._count = 0
        self._bytes = 0
        self._left = asyncio.Event()

    async def enter(self, size: int) -> None:
        """Waits for a place, and for room for that many bytes unless nothing else is under way."""
        while self._count and (self._count == self._most or self._bytes + size > self._most_bytes):
            self._left.clear()
            await self._left.wait()
        self._count += 1
        self._bytes += size

    def leave(self, size: int) -> None:
        """Gives the place back."""
        self._count -= 1
        self._bytes -= size
        self._left.set()
