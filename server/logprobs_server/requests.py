"""What a valid request asks for: an engine job, and the texts its tokens belong to. Plain data."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from logprobs_server.engine.types import GenerateJob, LogprobOptions, ScoreJob, length_normalized
from logprobs_server.text.vocabulary import Ranges

__all__ = [
    "MAX_ITEM_ID_BYTES",
    "GeneratePlan",
    "GivenText",
    "InputText",
    "Limits",
    "RankingCriterion",
    "RankingPlan",
    "ScorePlan",
    "Scoring",
]

MAX_ITEM_ID_BYTES = 1024
"""Longest id of a request of a stream."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What the server accepts at most. `alternatives` counts positions times alternatives of one request."""

    top_count: int
    completion_count: int
    beam_count: int
    stop_strings: int
    continuations: int
    alternatives: int
    request_bytes: int
    response_bytes: int
    full_distribution: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class InputText:
    """What is to become tokens, with special tokens put around it or not; see `Vocabulary.encode`."""

    text: str
    add_special_tokens: bool
    plain: Ranges = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class GivenText:
    """Tokens the caller gave, as they are told: ids, exact bytes, and where each starts.

    first: index, in the whole sequence, of the first of these tokens.
    byte_count: of the text they are part of, as the model saw it.
    text_changed: the tokenizer changed the text.
    source: what they were made of; None where token ids were given.
    """

    token_ids: Sequence[int]
    pieces: Sequence[bytes]
    byte_offsets: Sequence[int]
    code_point_offsets: Sequence[int]
    first: int
    byte_count: int
    text_changed: bool
    source: InputText | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Scoring:
    """The jobs that score some sequences.

    places: per sequence, the (job, continuation) pairs whose positions, put together, are the sequence's.
    """

    jobs: tuple[ScoreJob, ...]
    places: tuple[tuple[tuple[int, int], ...], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ScorePlan:
    """A valid ScoreRequest.

    neutral: scores the same tokens after the neutral context; None if there is none.
    logprobs: what is told of the tokens and of the next one.
    size_bound: bytes that the answer cannot pass, tokens that are not told included.
    in_parts: whether a message may be too small for the answer.
    """

    own: Scoring
    neutral: Scoring | None
    texts: tuple[GivenText, ...]
    logprobs: LogprobOptions
    totals_only: bool
    input_token_count: int
    size_bound: int
    in_parts: bool

    @property
    def jobs(self) -> tuple[ScoreJob, ...]:
        """All jobs, those of the neutral context last."""
        return self.own.jobs + (self.neutral.jobs if self.neutral else ())


class RankingCriterion(Enum):
    """How completions are ranked; the values are the contract's numbers."""

    MEAN_LOGPROB = 1
    TOTAL_LOGPROB = 2
    LENGTH_NORMALIZED = 3
    BEAM_SCORE = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class RankingPlan:
    """The criterion, and the exponent of the token count for LENGTH_NORMALIZED and BEAM_SCORE."""

    criterion: RankingCriterion = RankingCriterion.MEAN_LOGPROB
    length_exponent: float = 1.0

    def value(self, logprob: float, token_count: int) -> float:
        """What a completion with this total and length is ranked by; higher is better. One of no tokens is last."""
        if token_count == 0:
            return -math.inf
        match self.criterion:
            case RankingCriterion.TOTAL_LOGPROB:
                return logprob
            case RankingCriterion.MEAN_LOGPROB:
                return logprob / token_count
            case RankingCriterion.LENGTH_NORMALIZED | RankingCriterion.BEAM_SCORE:
                return length_normalized(logprob, token_count, self.length_exponent)


@dataclass(frozen=True, slots=True, kw_only=True)
class GeneratePlan:
    """A valid GenerateRequest; the best `completion_count` of the completions that the job draws are told."""

    job: GenerateJob
    prompt: GivenText
    completion_count: int
    ranking: RankingPlan

    @property
    def holds(self) -> bool:
        """Whether only the end shows which completions are told, because the job tells of more."""
        told = self.job.beams.told if self.job.beams else self.job.completion_count
        return self.completion_count < told
