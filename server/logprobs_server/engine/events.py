"""What the engine tells of a job, step by step.

Everything here is plain data: no tensors, no gRPC. All log probabilities are natural logarithms, in nats.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

__all__ = [
    "CompletionDecoded",
    "CompletionFinished",
    "ContinuationScored",
    "DecodedToken",
    "Event",
    "FinishReason",
    "JobFailed",
    "JobFinished",
    "JobStarted",
    "PositionLogprobs",
    "PromptScored",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class PositionLogprobs:
    """One position under the model's own distribution: temperature 1, nothing masked.

    token_id: the token that stands there; None for the distribution of a token that nobody chose.
    logprob, rank: of that token, None if there is none. Rank counts from 1.
    greedy: whether greedy decoding would have chosen that token.
    top_ids, top_logprobs: the most probable tokens, by logit, then by lower id.
    tail_logprob: log of the probability outside `top_ids`; None if no top was asked for.
    named_logprobs: of the token ids asked for, in their order.
    entropy: in nats; None if not asked for.
    all_logprobs: of every token id, in order, as an array of float32; empty if not asked for.
    """

    token_id: int | None
    logprob: float | None = None
    rank: int | None = None
    greedy: bool = False
    top_ids: Sequence[int] = ()
    top_logprobs: Sequence[float] = ()
    tail_logprob: float | None = None
    named_logprobs: Sequence[float] = ()
    entropy: float | None = None
    all_logprobs: Sequence[float] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodedToken:
    """A drawn token: the position under the model's distribution, how it was drawn, what it adds to the text."""

    position: PositionLogprobs
    sampling_logprob: float
    sampling_set_size: int
    bytes: bytes
    byte_offset: int
    code_point_offset: int
    trimmed: bool


class FinishReason(Enum):
    """Why a completion ended."""

    END_OF_SEQUENCE = "end_of_sequence"
    STOP_STRING = "stop_string"
    STOP_TOKEN = "stop_token"
    MAX_TOKENS = "max_tokens"
    CONTEXT_FULL = "context_full"
    TIME_LIMIT = "time_limit"


@dataclass(frozen=True, slots=True, kw_only=True)
class JobStarted:
    """First event of a job: it left the queue. `cached_token_count` of its tokens need no computing."""

    cached_token_count: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptScored:
    """Positions of the prompt of a GenerateJob, in order; any number of these until all are told."""

    positions: Sequence[PositionLogprobs]


@dataclass(frozen=True, slots=True, kw_only=True)
class ContinuationScored:
    """Scored positions of one continuation, in order; any number of these until all are told."""

    index: int
    positions: Sequence[PositionLogprobs]
    next_token: PositionLogprobs | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class CompletionDecoded:
    """Tokens and text of one completion that became certain."""

    index: int
    tokens: Sequence[DecodedToken]
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class CompletionFinished:
    """Last event of one completion. Totals cover every drawn token; `byte_count` is that of its text."""

    index: int
    reason: FinishReason
    token_count: int
    byte_count: int
    logprob: float
    sampling_logprob: float
    stop_string: str | None = None
    stop_token_id: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class JobFinished:
    """Last event of a job that did all it was asked for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class JobFailed:
    """Last event of a job that could not be done. `reason` is UPPER_SNAKE; `detail` is for our log."""

    reason: str
    detail: str


Event = (
    JobStarted | PromptScored | ContinuationScored | CompletionDecoded | CompletionFinished | JobFinished | JobFailed
)
