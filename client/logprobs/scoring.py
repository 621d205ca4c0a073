"""Puts the answers of a ScoreStream together again, and refuses a stream that breaks the contract. Pure."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

from google.rpc import code_pb2

from logprobs.errors import BrokenScoreStreamError, CallError, Violation, error_kind
from logprobs.v1 import logprobs_pb2 as pb

__all__ = ["ScoreAssembler", "StreamedScore"]


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamedScore:
    """What became of one request of a stream; either `response` or `error` is None.

    index: which request, from 0, in the order they were given.
    """

    index: int
    response: pb.ScoreResponse | None
    error: CallError | None


class ScoreAssembler:
    """Takes the messages of a stream; gives a result for every request, in the order of the answers."""

    def __init__(self) -> None:
        self._count = 0
        self._parts: dict[str, defaultdict[int, list[pb.ScorePart]]] = {}

    @property
    def num_unanswered(self) -> int:
        """Requests sent and not answered."""
        return len(self._parts)

    def send(self, request: pb.ScoreRequest) -> pb.ScoreStreamRequest:
        """The next request, with an id of its own."""
        item = pb.ScoreStreamRequest(id=str(self._count), request=request)
        self._parts[item.id] = defaultdict(list)
        self._count += 1
        return item

    def push(self, message: pb.ScoreStreamResponse) -> StreamedScore | None:
        """Takes the next message; gives a result with the last one about a request.

        Raises:
            BrokenScoreStreamError: the message answers no request in flight.
        """
        if message.id not in self._parts:
            raise BrokenScoreStreamError(f"the stream breaks the contract: an answer to no request, {message.id!r}")
        kind = message.WhichOneof("result")
        if kind == "part":
            self._parts[message.id][message.part.sequence].append(message.part)
        if kind not in ("response", "error"):
            return None
        parts = self._parts.pop(message.id)
        if kind == "error":
            return StreamedScore(index=int(message.id), response=None, error=_call_error(message.error))
        return StreamedScore(index=int(message.id), response=_whole(message.response, parts), error=None)

    def finish(self) -> None:
        """To be called when the stream has ended with OK.

        Raises:
            BrokenScoreStreamError: requests are not answered.
        """
        if self._parts:
            raise BrokenScoreStreamError(f"the stream ended with {len(self._parts)} requests unanswered")


def _whole(response: pb.ScoreResponse, parts: defaultdict[int, list[pb.ScorePart]]) -> pb.ScoreResponse:
    """The response with what came before it in parts."""
    if parts and not 0 <= min(parts) <= max(parts) < len(response.sequences):
        raise BrokenScoreStreamError("the stream breaks the contract: a part of no sequence")
    for index, pieces in parts.items():
        sequence = response.sequences[index]
        for piece in pieces:
            sequence.tokens.extend(piece.tokens)
            if piece.next_logprobs:
                sequence.next.logprobs.extend(piece.next_logprobs)
    return response


def _call_error(error: pb.ItemError) -> CallError:
    status = code_pb2.Code.Name(error.code) if error.code in code_pb2.Code.values() else "UNKNOWN"
    return error_kind(status)(
        error.message,
        status=status,
        reason=error.reason,
        violations=tuple(Violation(violation.field, violation.description) for violation in error.violations),
        retry_after=error.retry_after.ToTimedelta().total_seconds() if error.HasField("retry_after") else None,
    )
