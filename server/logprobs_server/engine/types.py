"""Values that cross the engine's boundary: the jobs it takes, what a model is, and the engine itself.

Everything here is plain data: no tensors, no gRPC. All log probabilities are natural logarithms, in nats.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Protocol

from logprobs_server.engine.events import Event

__all__ = [
    "BeamOptions",
    "Continuation",
    "EarlyStopping",
    "Engine",
    "EngineUnavailableError",
    "GenerateJob",
    "Job",
    "LogprobOptions",
    "ModelDescription",
    "SamplingOptions",
    "ScoreJob",
    "Sink",
    "StoppingOptions",
    "Ticket",
    "TokenBytes",
    "Told",
    "length_normalized",
]


def length_normalized(logprob: float, token_count: int, exponent: float) -> float:
    """A total divided by its number of tokens to the power of `exponent`; a power that no float holds is at its end."""
    try:
        power: float = float(token_count) ** exponent
    except OverflowError:
        power = sys.float_info.max
    return logprob / max(power, sys.float_info.min)


@dataclass(frozen=True, slots=True, kw_only=True)
class LogprobOptions:
    """What to tell about a position besides the logprob of its token; `full` is the logprob of every token."""

    top_count: int = 0
    token_ids: tuple[int, ...] = ()
    entropy: bool = False
    full: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingOptions:
    """How tokens are drawn; `seed` is that of completion 0, completion i uses `seed + i`.

    logit_bias: token ids, each once, and what is added to their logits.
    """

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    seed: int
    typical_p: float = 1.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()

    @property
    def penalizes(self) -> bool:
        """Whether tokens that occurred count."""
        return (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != (1.0, 0.0, 0.0)


class EarlyStopping(Enum):
    """When a beam search that has as many finished hypotheses as beams ends; as transformers' `early_stopping`.

    HEURISTIC: when the best beam would not beat the worst of them if it ended now.
    WHEN_FULL: at once.
    NEVER: when no beam can beat the worst of them, however long it grows.
    """

    HEURISTIC = "heuristic"
    WHEN_FULL = "when_full"
    NEVER = "never"


@dataclass(frozen=True, slots=True, kw_only=True)
class BeamOptions:
    """How beams are searched.

    told: the completions whose tokens are told, those with the best beam scores; others only end.
    """

    length_penalty: float
    early_stopping: EarlyStopping
    told: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StoppingOptions:
    """What ends a completion before its last possible token.

    deadline_s: when the job ends with what there is, by `time.monotonic`; None if it may take any time.
    """

    strings: tuple[str, ...] = ()
    token_ids: tuple[int, ...] = ()
    include: bool = False
    min_tokens: int = 0
    ignore_eos: bool = False
    deadline_s: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Continuation:
    """Tokens that follow the prefix of a ScoreJob; those from `scored_from` on are scored."""

    token_ids: tuple[int, ...]
    scored_from: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreJob:
    """Scores continuations of one prefix, which is computed once.

    A token that nothing precedes has no distribution and is not reported: it is for the caller to add.

    next_logprobs: what to tell of the token that would come after each continuation; None tells nothing of it.
    """

    prefix: tuple[int, ...]
    continuations: tuple[Continuation, ...]
    logprobs: LogprobOptions
    next_logprobs: LogprobOptions | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateJob:
    """Draws completions of a prompt, which is computed once.

    The prompt's first token has no distribution and is not among the positions reported.

    beams: searches with as many beams as completions instead, without sampling; completion 0 has the best beam score.
    """

    prompt: tuple[int, ...]
    max_tokens: int
    completion_count: int
    sampling: SamplingOptions
    stopping: StoppingOptions
    logprobs: LogprobOptions
    prompt_logprobs: LogprobOptions | None = None
    beams: BeamOptions | None = None


Job = ScoreJob | GenerateJob


Sink = Callable[[Sequence[Event]], None]
"""Takes the events that one step gave one job; must not block."""

Told = list[tuple[Sink, Sequence[Event]]]
"""What one step gave, and who takes it."""


@dataclass(frozen=True, slots=True, eq=False)
class Ticket:
    """Stands for one submitted job."""

    job: Job = field(repr=False)
    sink: Sink = field(repr=False)


class TokenBytes(Protocol):
    """The engine's view of a vocabulary."""

    def token_bytes(self, token_id: int) -> bytes:
        """What the token adds to a text; empty for special tokens."""

    def spelled(self, token_id: int) -> bytes:
        """The token's bytes, a special one's spelling."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelDescription:
    """What is served, and what one sequence or request can be at most."""

    name: str
    revision: str
    dtype: str
    batch_invariant: bool
    vocabulary_size: int
    context_length: int
    eos_token_ids: tuple[int, ...]
    bos_token_id: int | None


class EngineUnavailableError(Exception):
    """The engine takes no more jobs: its queue is full (waiting helps), or it is closing (it does not)."""

    def __init__(self, message: str, *, reason: str, retry_after_s: float | None) -> None:
        super().__init__(message)
        self.reason = reason
        self.retry_after_s = retry_after_s


class Engine(Protocol):
    """What the service needs of an engine. Methods may be called from any thread."""

    @property
    def description(self) -> ModelDescription:
        """The model served."""

    def unfit(self, job: Job) -> str | None:
        """Why this engine could never do this job, whatever the load; None if it can."""

    def submit(self, job: Job, sink: Sink) -> Ticket:
        """Queues a job.

        Raises:
            EngineUnavailableError: the queue is full, or the engine is closing.
        """

    def cancel(self, ticket: Ticket) -> None:
        """Forgets a job within one step; no event follows. A job that has ended is left alone."""

    def close(self) -> None:
        """Ends the engine's thread; jobs under way fail."""
