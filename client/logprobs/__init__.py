"""The light client of Logprobs: token log probabilities over gRPC. Needs no torch and no server code.

`Client` and `AsyncClient` call the service; messages of the contract are in `logprobs.v1.logprobs_pb2`.
"""

from __future__ import annotations

from logprobs.calls import AsyncGenerateStream, GenerateStream
from logprobs.client import AsyncClient, Client
from logprobs.errors import (
    BrokenScoreStreamError,
    CallError,
    DeadlineExceededError,
    IncompleteStreamError,
    InconsistentStreamError,
    InternalError,
    InvalidRequestError,
    InvalidTextError,
    LogprobsError,
    PermissionDeniedError,
    RequestCancelledError,
    ResourceExhaustedError,
    StreamError,
    UnauthenticatedError,
    UnavailableError,
    UnimplementedError,
    Violation,
)
from logprobs.generation import Completion, Generation
from logprobs.ranking import bits_per_byte, mean_logprob, perplexity, rank
from logprobs.requests import score_request
from logprobs.score_stream import AsyncScoreStream, ScoreStream
from logprobs.scoring import StreamedScore
from logprobs.stream import StreamAssembler

__all__ = [
    "AsyncClient",
    "AsyncGenerateStream",
    "AsyncScoreStream",
    "BrokenScoreStreamError",
    "CallError",
    "Client",
    "Completion",
    "DeadlineExceededError",
    "GenerateStream",
    "Generation",
    "IncompleteStreamError",
    "InconsistentStreamError",
    "InternalError",
    "InvalidRequestError",
    "InvalidTextError",
    "LogprobsError",
    "PermissionDeniedError",
    "RequestCancelledError",
    "ResourceExhaustedError",
    "ScoreStream",
    "StreamAssembler",
    "StreamError",
    "StreamedScore",
    "UnauthenticatedError",
    "UnavailableError",
    "UnimplementedError",
    "Violation",
    "bits_per_byte",
    "mean_logprob",
    "perplexity",
    "rank",
    "score_request",
]
