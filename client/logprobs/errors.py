"""Every error that this package raises by itself. Knows status names, not gRPC.

A mistake in how a Python function is called stays a TypeError or ValueError.
"""

from __future__ import annotations

from typing import NamedTuple

from logprobs.generation import Generation

__all__ = [
    "BrokenScoreStreamError",
    "CallError",
    "DeadlineExceededError",
    "IncompleteStreamError",
    "InconsistentStreamError",
    "InternalError",
    "InvalidRequestError",
    "InvalidTextError",
    "LogprobsError",
    "PermissionDeniedError",
    "RequestCancelledError",
    "ResourceExhaustedError",
    "StreamError",
    "UnauthenticatedError",
    "UnavailableError",
    "UnimplementedError",
    "Violation",
    "error_kind",
]


class Violation(NamedTuple):
    """A rule that a request breaks: the field's path, for example "sampling.top_p", and the rule with its value."""

    field: str
    description: str


class LogprobsError(Exception):
    """Any error of this package."""


class InvalidTextError(LogprobsError, ValueError):
    """Text that UTF-8 cannot carry, because it holds a lone surrogate. Raised before anything is sent.

    field: the path of the text in the request.
    """

    def __init__(self, field: str, position: int) -> None:
        super().__init__(f"{field}: the character at {position} is a lone surrogate, which UTF-8 cannot carry")
        self.field = field


class CallError(LogprobsError):
    """A call that ended with a status other than OK; statuses that callers tell apart have subclasses.

    status: gRPC's name of it, for example "UNAVAILABLE".
    reason: UPPER_SNAKE, from the server; empty where gRPC itself ended the call.
    request_id: to find the call in the server's log; empty if the server told none.
    violations: the rules that the request breaks.
    retry_after: seconds after which trying again may help; None if the server told none.
    """

    def __init__(
        self,
        message: str,
        *,
        status: str,
        reason: str = "",
        request_id: str = "",
        violations: tuple[Violation, ...] = (),
        retry_after: float | None = None,
    ) -> None:
        super().__init__(f"{status}: {message}" if message else status)
        self.message = message
        self.status = status
        self.reason = reason
        self.request_id = request_id
        self.violations = violations
        self.retry_after = retry_after


class InvalidRequestError(CallError):
    """INVALID_ARGUMENT: the request is wrong, whatever the load."""


class UnauthenticatedError(CallError):
    """UNAUTHENTICATED: no token, or a wrong one."""


class PermissionDeniedError(CallError):
    """PERMISSION_DENIED: this caller may not use the method."""


class ResourceExhaustedError(CallError):
    """RESOURCE_EXHAUSTED: over a quota or gRPC's own message size."""


class UnavailableError(CallError):
    """UNAVAILABLE: not reachable, loading, full or shutting down; trying again may help."""


class UnimplementedError(CallError):
    """UNIMPLEMENTED: the server does not serve the method."""


class DeadlineExceededError(CallError):
    """DEADLINE_EXCEEDED: the client's timeout ran out."""


class RequestCancelledError(CallError):
    """CANCELLED: the call was cancelled. Not asyncio's CancelledError, which is about the task that waits."""


class InternalError(CallError):
    """INTERNAL: the server's fault; its log tells more under the request id."""


_KINDS: dict[str, type[CallError]] = {
    "CANCELLED": RequestCancelledError,
    "DEADLINE_EXCEEDED": DeadlineExceededError,
    "INTERNAL": InternalError,
    "INVALID_ARGUMENT": InvalidRequestError,
    "PERMISSION_DENIED": PermissionDeniedError,
    "RESOURCE_EXHAUSTED": ResourceExhaustedError,
    "UNAUTHENTICATED": UnauthenticatedError,
    "UNAVAILABLE": UnavailableError,
    "UNIMPLEMENTED": UnimplementedError,
}


def error_kind(status: str) -> type[CallError]:
    """The class of error that a status, by its name, is raised as."""
    return _KINDS.get(status, CallError)


class BrokenScoreStreamError(LogprobsError):
    """A stream of scores that breaks a rule of the contract, or left requests unanswered; what it gave is valid."""


class StreamError(LogprobsError):
    """A stream that is not the whole answer.

    partial: what had arrived and was sound; a completion that is not `finished` is incomplete.
    """

    def __init__(self, message: str, partial: Generation) -> None:
        super().__init__(message)
        self.partial = partial


class IncompleteStreamError(StreamError):
    """The stream ended early.

    cause: the error it ended with; None if the server ended it as if it were whole.
    """

    def __init__(self, message: str, partial: Generation, cause: CallError | None = None) -> None:
        super().__init__(message, partial)
        self.cause = cause


class InconsistentStreamError(StreamError):
    """The stream breaks a rule of the contract: the server is wrong, or something between has lost or moved events."""
