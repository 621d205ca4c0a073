"""Turns what gRPC raises into this package's errors, in one place. Knows gRPC and google.rpc, not our messages.

Details travel as google.rpc.Status in a binary trailer; decoding it here saves the light client a package.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import grpc
from google.protobuf.message import DecodeError, Message
from google.rpc import error_details_pb2, status_pb2

from logprobs.errors import CallError, Violation, error_kind

__all__ = ["REQUEST_ID", "call_error"]

REQUEST_ID = "x-request-id"
_DETAILS = "grpc-status-details-bin"


def call_error(error: grpc.RpcError) -> CallError:
    """The typed error of what a call, sync or not, raised. Details that cannot be decoded are left out."""
    call: Any = error  # both of gRPC's errors tell status and metadata, and their common type neither
    info, bad, retry = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest(), error_details_pb2.RetryInfo()
    _unpack(_value(call.trailing_metadata(), _DETAILS), (info, bad, retry))
    status = call.code().name
    request_id = info.metadata.get("request_id") or _value(call.initial_metadata(), REQUEST_ID)
    return error_kind(status)(
        call.details() or "",
        status=status,
        reason=info.reason,
        request_id=request_id or "",
        violations=tuple(Violation(v.field, v.description) for v in bad.field_violations),
        retry_after=retry.retry_delay.ToTimedelta().total_seconds() if retry.HasField("retry_delay") else None,
    )


def _unpack(data: bytes | None, into: tuple[Message, ...]) -> None:
    """Fills the messages from the details of their type."""
    try:
        for detail in status_pb2.Status.FromString(data or b"").details:
            for message in into:
                detail.Unpack(message)
    except DecodeError:
        return


def _value(metadata: Iterable[tuple[str, Any]] | None, key: str) -> Any:
    return next((value for name, value in metadata or () if name == key), None)
