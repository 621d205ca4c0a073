"""What surrounds every call of our service: request ids, requests that cannot be decoded, errors, the log.

The one place where errors become gRPC statuses with google.rpc details.
"""

from __future__ import annotations

import asyncio
import logging
import re
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.protobuf.message import DecodeError, Message
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_status import rpc_status

from logprobs_server.errors import EngineFailedError, MalformedRequestError, ServiceError, Violation

__all__ = ["CallInterceptor", "status_of"]

_log = logging.getLogger(__name__)
_REQUEST_ID = "x-request-id"
_SOUND_ID = re.compile(r"[\x21-\x7e]{1,128}")
_DOMAIN = "logprobs"
_PATIENCE_S = 1.0  # for gRPC to cancel a call whose caller has gone; on busy cores that came after 1.1 ms
_MAX_DETAILS_BYTES = 3800  # gRPC's trailers hold 8 KiB in all, and details travel in base64


class CallInterceptor(grpc.aio.ServerInterceptor):
    """Wraps every method of one service."""

    def __init__(self, service: str) -> None:
        self._prefix = f"/{service}/"

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        """The handler with what surrounds it; other services' handlers as they are."""
        handler: Any = await continuation(handler_call_details)
        if handler is None or not handler_call_details.method.startswith(self._prefix):
            return handler  # type: ignore[no-any-return]
        call = _Call(handler_call_details.method.removeprefix(self._prefix), handler)
        decode = _tolerant(handler.request_deserializer)
        encode = handler.response_serializer
        make: Any
        behaviour: Any
        if handler.request_streaming:
            make, behaviour = grpc.stream_stream_rpc_method_handler, call.stream
        elif handler.response_streaming:
            make, behaviour = grpc.unary_stream_rpc_method_handler, call.stream
        else:
            make, behaviour = grpc.unary_unary_rpc_method_handler, call.unary
        return make(behaviour, decode, encode)  # type: ignore[no-any-return]


class _Call:
    """One method's behaviour with what surrounds it."""

    def __init__(self, method: str, handler: Any) -> None:
        self._method = method
        self._handler = handler

    async def unary(self, request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
        """Answers once."""
        watch = _Watch(self._method, context)
        try:
            response = await self._handler.unary_unary(_sound(request), context)
            await watch.identify()
        except BaseException as error:
            await watch.failed(error)
            raise
        watch.finished("OK")
        return response

    async def stream(self, request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        """Answers any number of times."""
        watch = _Watch(self._method, context)
        behaviour = self._handler.stream_stream if self._handler.request_streaming else self._handler.unary_stream
        try:
            given = _all_sound(request) if self._handler.request_streaming else _sound(request)
            await behaviour(given, watch)
        except BaseException as error:
            await watch.failed(error)
            raise
        watch.finished("OK")


class _Watch:
    """Follows one call to its end; what a method that answers with a stream writes to."""

    def __init__(self, method: str, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        given = dict(context.invocation_metadata() or ()).get(_REQUEST_ID, "")
        sound = isinstance(given, str) and _SOUND_ID.fullmatch(given)
        self._method = method
        self._request_id = str(given) if sound else uuid.uuid4().hex
        self._context = context
        self._identified = False
        self._start = time.perf_counter()

    async def identify(self) -> None:
        """Tells the caller the request's id, with the initial metadata: once, before the first message."""
        if not self._identified:
            self._identified = True
            await self._context.send_initial_metadata(((_REQUEST_ID, self._request_id),))

    def write(self, response: Any) -> Awaitable[None]:
        """Sends one message of a stream."""
        return self._context.write(response) if self._identified else self._write_first(response)

    async def _write_first(self, response: Any) -> None:
        await self.identify()
        await self._context.write(response)

    def finished(self, status: str) -> None:
        """Logs the end."""
        seconds = time.perf_counter() - self._start
        _log.info("%s %s in %.3f s, request %s", self._method, status, seconds, self._request_id)

    async def failed(self, error: BaseException) -> None:
        """Ends the call with the status of the error, unless the caller has gone. Does not return normally then."""
        gone = isinstance(error, grpc.aio.InternalError) and await _cancelled_soon()
        if gone or isinstance(error, asyncio.CancelledError | GeneratorExit):
            self.finished("CANCELLED")
            return
        if not isinstance(error, ServiceError):
            _log.error("%s failed, request %s", self._method, self._request_id, exc_info=error)
            error = EngineFailedError(f"internal error; our log has it under request {self._request_id}")
        self.finished(error.status)
        if error.status == "UNAVAILABLE":  # gRPC retries a call by itself only while nothing of an answer has come
            self._context.set_trailing_metadata(((_REQUEST_ID, self._request_id),))
        else:
            await self.identify()
        await self._context.abort_with_status(rpc_status.to_status(status_of(error, self._request_id)))


async def _cancelled_soon() -> bool:
    """Whether what could not be sent failed because the caller has gone: gRPC then cancels the task soon after.

    Its context tells of neither a cancelled call nor a passed deadline until the task has ended.
    """
    try:
        await asyncio.sleep(_PATIENCE_S)
    except asyncio.CancelledError:
        return True
    return False


def status_of(error: ServiceError, request_id: str) -> status_pb2.Status:
    """The error as google.rpc.Status: ErrorInfo always, BadRequest with violations, RetryInfo if waiting helps."""
    details: list[Message] = [
        error_details_pb2.ErrorInfo(reason=error.reason, domain=_DOMAIN, metadata={"request_id": request_id})
    ]
    if error.retry_after_s is not None:
        delay = duration_pb2.Duration()
        delay.FromNanoseconds(int(error.retry_after_s * 1e9))
        details.append(error_details_pb2.RetryInfo(retry_delay=delay))
    if error.violations:
        details.append(_bad_request(error.violations, error.num_unlisted))
    packed = []
    for detail in details:
        packed.append(any_pb2.Any())
        packed[-1].Pack(detail)
    return status_pb2.Status(code=code_pb2.Code.Value(error.status), message=error.message, details=packed)


def _bad_request(violations: tuple[Violation, ...], num_unlisted: int) -> error_details_pb2.BadRequest:
    """As many violations as fit the trailers; if there are more, the last entry counts them."""
    bad = error_details_pb2.BadRequest()
    for index, violation in enumerate(violations):
        bad.field_violations.add(field=violation.field, description=violation.description)
        if bad.ByteSize() > _MAX_DETAILS_BYTES:
            del bad.field_violations[-1]
            num_unlisted += len(violations) - index
            break
    if num_unlisted:
        bad.field_violations.add(field="", description=f"and {num_unlisted} more")
    return bad


class _Undecodable:
    """Stands for a request whose bytes are no message."""


def _tolerant(decode: Callable[[bytes], Any]) -> Callable[[bytes], Any]:
    """A decoder whose failure reaches us; gRPC alone would answer UNKNOWN."""

    def decoded(data: bytes) -> Any:
        try:
            return decode(data)
        except DecodeError:
            return _Undecodable()

    return decoded


async def _all_sound(requests: AsyncIterator[Any]) -> AsyncIterator[Any]:
    async for request in requests:
        yield _sound(request)


def _sound(request: Any) -> Any:
    if isinstance(request, _Undecodable):
        raise MalformedRequestError("the request cannot be decoded as a message of this method")
    return request
