"""What calls that answer with a stream share: how they are iterated, cancelled and left. Knows no messages."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from typing import Any, Self, TypeVar

__all__ = ["AsyncReading", "Reading", "this_task_is_cancelled"]

_Item = TypeVar("_Item")


class _Cancellable:
    """A call that may be ended before its answer has."""

    _call: Any

    def cancel(self) -> None:
        """Ends the call; the server frees what it held. After the stream's end it does nothing."""
        self._call.cancel()


class Reading(_Cancellable, Iterator[_Item]):
    """A stream that is read by iterating. As a context manager it cancels the call when left."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.cancel()


class AsyncReading(_Cancellable, AsyncIterator[_Item]):
    """The same for asyncio."""

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *error: object) -> None:
        self.cancel()


def this_task_is_cancelled() -> bool:
    """gRPC raises CancelledError for a call that was cancelled, too; it is no end of the task that reads it."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0
