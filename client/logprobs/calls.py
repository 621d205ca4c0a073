"""A Generate call as it runs: events as they come, the whole at the end. Knows gRPC's calls, not how they are made.

Both streams pass every event through an assembler, so neither a broken stream nor a wrong one ever ends as if it
were whole, however it is read.
"""

from __future__ import annotations

import asyncio
from typing import Any

import grpc

from logprobs.errors import CallError, IncompleteStreamError, InconsistentStreamError, RequestCancelledError
from logprobs.generation import Generation
from logprobs.reading import AsyncReading, Reading, this_task_is_cancelled
from logprobs.status import call_error
from logprobs.stream import StreamAssembler
from logprobs.v1 import logprobs_pb2 as pb

__all__ = ["AsyncGenerateStream", "GenerateStream"]


class _Stream:
    """What both streams share."""

    def __init__(self, call: Any) -> None:
        self._call = call
        self._assembler = StreamAssembler()

    @property
    def generation(self) -> Generation:
        """What has been read so far."""
        return self._assembler.generation

    def _take(self, event: pb.GenerateResponse) -> pb.GenerateResponse:
        try:
            self._assembler.push(event)
        except InconsistentStreamError:
            self._call.cancel()
            raise
        return event

    def _broken(self, cause: CallError) -> CallError | IncompleteStreamError:
        """The call's own error where nothing had arrived; else one that carries what had."""
        arrived = self._assembler.generation
        if arrived.started is None:
            return cause
        return IncompleteStreamError(f"the stream broke: {cause}", arrived, cause)


class GenerateStream(_Stream, Reading[pb.GenerateResponse]):
    """The events of a Generate call, in order, as they arrive. As a context manager it cancels the call when left.

    Raises, while read:
        CallError: the call failed before anything arrived.
        IncompleteStreamError: it failed, or was cancelled, later; InconsistentStreamError: it broke the contract.
    """

    def __next__(self) -> pb.GenerateResponse:
        try:
            return self._take(next(self._call))
        except StopIteration:
            self._assembler.finish()
            raise
        except grpc.RpcError as error:
            raise self._broken(call_error(error)) from error

    def collect(self) -> Generation:
        """Reads what is left; gives the whole."""
        for _ in self:
            pass
        return self._assembler.finish()


class AsyncGenerateStream(_Stream, AsyncReading[pb.GenerateResponse]):
    """The same for asyncio. That its call was cancelled raises as above, that the waiting task was, CancelledError."""

    def __init__(self, call: Any) -> None:
        super().__init__(call)
        self._events = call.__aiter__()

    async def __anext__(self) -> pb.GenerateResponse:
        try:
            return self._take(await anext(self._events))
        except StopAsyncIteration:
            self._assembler.finish()
            raise
        except grpc.RpcError as error:
            raise self._broken(call_error(error)) from error
        except asyncio.CancelledError:
            if this_task_is_cancelled():
                raise
            raise self._broken(RequestCancelledError("cancelled by the client", status="CANCELLED")) from None

    async def collect(self) -> Generation:
        """Reads what is left; gives the whole."""
        async for _ in self:
            pass
        return self._assembler.finish()
