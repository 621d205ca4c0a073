"""Every error the service returns, with its status name and reason. Knows status names, not grpc."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = [
    "MAX_VIOLATIONS",
    "EngineFailedError",
    "InvalidRequestError",
    "MalformedRequestError",
    "NotReadyError",
    "OverloadedError",
    "ServiceError",
    "Violation",
    "shown",
    "shown_float",
]

MAX_VIOLATIONS = 20
"""Broken rules that are listed; more are counted."""
_MAX_SHOWN = 64


@dataclass(frozen=True, slots=True)
class Violation:
    """A broken rule: the field's path, for example "sampling.top_p", and the rule with the value that broke it."""

    field: str
    description: str


def shown(value: object) -> str:
    """A value for a message: as Python would write it, cut to 64 characters."""
    text = repr(value)
    return text if len(text) <= _MAX_SHOWN else f"{text[: _MAX_SHOWN - 1]}…"


def shown_float(value: float) -> str:
    """A float32 for a message: as briefly as tells it from all others; what is just above 1 is not shown as 1."""
    data = struct.pack("f", value)
    return next((t for t in (f"{value:.{n}g}" for n in range(6, 10)) if struct.pack("f", float(t)) == data), str(value))


class ServiceError(Exception):
    """An error with a gRPC status. Subclasses fix `status` and a default `reason`."""

    status = "UNKNOWN"
    reason = "UNKNOWN"

    def __init__(
        self,
        message: str,
        *,
        reason: str | None = None,
        violations: Sequence[Violation] = (),
        num_unlisted: int = 0,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.reason = reason or self.reason
        self.violations = tuple(violations)
        self.num_unlisted = num_unlisted
        self.retry_after_s = retry_after_s


class InvalidRequestError(ServiceError):
    """The request breaks rules, whatever the load; the first are listed, all are counted."""

    status = "INVALID_ARGUMENT"
    reason = "INVALID_REQUEST"

    def __init__(self, violations: Sequence[Violation], num_unlisted: int) -> None:
        first, num_more = violations[0], len(violations) - 1 + num_unlisted
        more = f" (and {num_more} more)" if num_more else ""
        message = f"{first.field}: {first.description}{more}"
        super().__init__(message, violations=violations, num_unlisted=num_unlisted)


class MalformedRequestError(ServiceError):
    """The request's bytes are no message of the expected type."""

    status = "INVALID_ARGUMENT"
    reason = "MALFORMED_REQUEST"


class OverloadedError(ServiceError):
    """The queue is full; waiting helps."""

    status = "UNAVAILABLE"
    reason = "QUEUE_FULL"


class NotReadyError(ServiceError):
    """The server is loading its model or shutting down."""

    status = "UNAVAILABLE"
    reason = "LOADING"


class EngineFailedError(ServiceError):
    """Our fault; the details are in our log, under the request's id."""

    status = "INTERNAL"
    reason = "INTERNAL"
