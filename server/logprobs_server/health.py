"""The standard health service: one status, the server's and its service's. Knows nothing of what is healthy."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

__all__ = ["Health"]

_SERVING = health_pb2.HealthCheckResponse.SERVING
_NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
_SERVICE_UNKNOWN = health_pb2.HealthCheckResponse.SERVICE_UNKNOWN


class Health(health_pb2_grpc.HealthServicer):  # type: ignore[misc]  # grpc_health is not typed
    """NOT_SERVING, then SERVING, then closed: NOT_SERVING for good.

    Those who watch are let go when it closes: grpcio's own servicer keeps them, and they hold up the server's end
    until its grace is over.
    """

    def __init__(self, service: str) -> None:
        self._names = ("", service)
        self._status = _NOT_SERVING
        self._closed = False
        self._changed = asyncio.Event()

    def serving(self) -> None:
        """The server can be used, unless it is closed."""
        if not self._closed:
            self._change(_SERVING)

    def close(self) -> None:
        """The server stops."""
        self._closed = True
        self._change(_NOT_SERVING)

    async def Check(self, request: Any, context: Any) -> Any:  # noqa: N802
        """The status now."""
        if request.service not in self._names:
            await context.abort(grpc.StatusCode.NOT_FOUND, "no such service")
        return health_pb2.HealthCheckResponse(status=self._status)

    async def Watch(self, request: Any, context: Any) -> AsyncIterator[Any]:  # noqa: N802
        """The status now, and whenever it changes."""
        told = None
        while True:
            changed, closed = self._changed, self._closed
            status = self._status if request.service in self._names else _SERVICE_UNKNOWN
            if status != told:
                told = status
                yield health_pb2.HealthCheckResponse(status=status)
            if closed:
                return
            await changed.wait()

    def _change(self, status: Any) -> None:
        self._status = status
        self._changed.set()
        self._changed = asyncio.Event()
