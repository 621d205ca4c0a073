"""A ScoreStream call as it runs: requests are taken as there is room for them, results given as they come.

No more than `max_in_flight` requests are taken before their results are: neither side ever holds more.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterable, Iterator
from typing import Any

import grpc

from logprobs.errors import BrokenScoreStreamError, RequestCancelledError
from logprobs.reading import AsyncReading, Reading, this_task_is_cancelled
from logprobs.scoring import ScoreAssembler, StreamedScore
from logprobs.status import call_error
from logprobs.v1 import logprobs_pb2 as pb

__all__ = ["MAX_IN_FLIGHT", "AsyncScoreStream", "ScoreStream"]

MAX_IN_FLIGHT = 128
"""Twice what the server scores at once: the other half is under way."""

_Build = Callable[[Any], pb.ScoreRequest]


class _Stream:
    """What both streams share."""

    def __init__(self, build: _Build, max_in_flight: int) -> None:
        if max_in_flight < 1:
            raise ValueError(f"max_in_flight: {max_in_flight} is below 1")
        self._build = build
        self._assembler = ScoreAssembler()
        self._call: Any = None
        self._failure: Exception | None = None  # of taking requests: ends them, and is raised after the last result

    def _take(self, message: pb.ScoreStreamResponse) -> StreamedScore | None:
        try:
            return self._assembler.push(message)
        except BrokenScoreStreamError:
            self._call.cancel()
            raise

    def _finish(self) -> None:
        if self._failure is not None:
            raise self._failure
        self._assembler.finish()


class ScoreStream(_Stream, Reading[StreamedScore]):
    """The results of a ScoreStream call, in the order they come. As a context manager it cancels the call when left.

    Raises, while read:
        CallError: the call failed; results given before are valid. BrokenScoreStreamError: it broke the contract.
        What taking a request raises.
    """

    def __init__(self, method: Any, settings: Any, requests: Iterable[Any], build: _Build, max_in_flight: int) -> None:
        super().__init__(build, max_in_flight)
        self._room = threading.Semaphore(max_in_flight)
        self._left = False
        self._call = method(self._sent(requests), **settings)

    def cancel(self) -> None:
        self._leave()
        super().cancel()

    def _leave(self) -> None:
        """Lets go of the thread that waits to send another request."""
        self._left = True
        self._room.release()

    def __next__(self) -> StreamedScore:
        try:
            while True:
                result = self._take(next(self._call))
                if result is not None:
                    self._room.release()
                    return result
        except StopIteration:
            self._leave()
            self._finish()
            raise
        except grpc.RpcError as error:
            self._leave()
            raise call_error(error) from error

    def _sent(self, requests: Iterable[Any]) -> Iterator[pb.ScoreStreamRequest]:
        """Runs on a thread of gRPC's, where nobody would hear what is raised."""
        try:
            for request in requests:
                self._room.acquire()
                if self._left:
                    return
                yield self._assembler.send(self._build(request))
        except Exception as error:
            self._failure = error


class AsyncScoreStream(_Stream, AsyncReading[StreamedScore]):
    """The same for asyncio; requests may come from an asynchronous iterable, too."""

    def __init__(
        self,
        method: Any,
        settings: Any,
        requests: Iterable[Any] | AsyncIterable[Any],
        build: _Build,
        max_in_flight: int,
    ) -> None:
        super().__init__(build, max_in_flight)
        self._room = asyncio.Semaphore(max_in_flight)
        self._call = method(self._sent(requests), **settings)
        self._messages = self._call.__aiter__()

    async def __anext__(self) -> StreamedScore:
        try:
            while True:
                result = self._take(await anext(self._messages))
                if result is not None:
                    self._room.release()
                    return result
        except StopAsyncIteration:
            self._finish()
            raise
        except grpc.RpcError as error:
            raise call_error(error) from error
        except asyncio.CancelledError:
            if this_task_is_cancelled():
                raise
            raise RequestCancelledError("cancelled by the client", status="CANCELLED") from None

    async def _sent(self, requests: Iterable[Any] | AsyncIterable[Any]) -> AsyncIterator[pb.ScoreStreamRequest]:
        try:
            async for request in _each(requests):
                await self._room.acquire()
                yield self._assembler.send(self._build(request))
        except Exception as error:
            self._failure = error


async def _each(requests: Iterable[Any] | AsyncIterable[Any]) -> AsyncIterator[Any]:
    if isinstance(requests, AsyncIterable):
        async for request in requests:
            yield request
    else:
        for request in requests:
            yield request
