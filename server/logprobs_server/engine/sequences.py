"""Sequences and the jobs they belong to: the engine's state between steps. No tensors but kept hidden states.

A job computes its prefix (prompt or context) once, as the *root* sequence; *branches* (continuations to score,
completions to draw) start where the root ends and share its blocks.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from logprobs_server.engine.adjustment import Adjustment, JobAdjustment
from logprobs_server.engine.sampling import Draw
from logprobs_server.engine.types import (
    CompletionDecoded,
    CompletionFinished,
    Continuation,
    DecodedToken,
    Event,
    FinishReason,
    GenerateJob,
    LogprobOptions,
    PositionLogprobs,
    ScoreJob,
    Ticket,
    TokenBytes,
)
from logprobs_server.text.completion import CompletionText, Delta

__all__ = ["Completion", "JobState", "Row", "Sequence"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One distribution wanted of a step.

    token_id: the token to report, None if it is to be drawn or nobody chose it.
    draw: how to draw it, None if it is not drawn.
    """

    sequence: Sequence
    options: LogprobOptions
    token_id: int | None = None
    draw: Draw | None = None


class Sequence:
    """Token ids, how many of them are computed, and the blocks that hold their keys and values.

    targets_from: index of the first token to report; None reports none.
    goal: how many tokens are to be computed; a completion's goal grows with it.
    num_known, chain: how many of its blocks the pool knows, and what stands there for all they hold.
    """

    def __init__(
        self,
        job: JobState,
        branch: int | None,
        token_ids: list[int],
        blocks: list[int],
        *,
        computed: int,
        goal: int,
    ) -> None:
        self.job = job
        self.branch = branch
        self.token_ids = token_ids
        self.blocks = blocks
        self.num_computed = computed
        self.goal = goal
        self.num_known = 0
        self.chain = 0
        self.targets_from: int | None = None
        self.options = job.options
        self.completion: Completion | None = None
        self.last_hidden: Any = None  # [hidden] of the token before the next one, while branches are to start here

    @property
    def num_pending(self) -> int:
        """Tokens that wait to be computed."""
        return self.goal - self.num_computed

    def rows_after(self, start: int, stop: int) -> Iterator[tuple[int, Row]]:
        """Rows wanted of tokens start … stop - 1, with the index of the token each follows."""
        length = len(self.token_ids)
        if self.targets_from is not None:
            for index in range(max(start, self.targets_from - 1, 0), min(stop, length - 1)):
                yield index, Row(sequence=self, options=self.options, token_id=self.token_ids[index + 1])
        if stop == length:
            row = self.final_row()
            if row is not None:
                yield length - 1, row

    def final_row(self) -> Row | None:
        """The row that follows the last token there is, if one is wanted."""
        if self.completion is not None:
            return Row(sequence=self, options=self.options, draw=self.completion.next_draw())
        if self.branch is not None and (options := self.job.next_options) is not None:
            return Row(sequence=self, options=options)
        return None


class Completion:
    """One completion: what was drawn so far, its text, and whether that ends it."""

    def __init__(
        self,
        job: GenerateJob,
        index: int,
        eos_token_ids: frozenset[int],
        room: int,
        adjustment: JobAdjustment | None,
    ) -> None:
        self._stopping = job.stopping
        self._sampling = job.sampling
        self._index = index
        self._eos = eos_token_ids
        self._stop_tokens = frozenset(job.stopping.token_ids)
        self._limit = min(job.max_tokens, room)
        self._limit_reason = FinishReason.MAX_TOKENS if job.max_tokens <= room else FinishReason.CONTEXT_FULL
        self._text = CompletionText(job.stopping.strings, job.stopping.include)
        self._adjustment = None if adjustment is None else Adjustment(adjustment)
        self._waiting: deque[tuple[PositionLogprobs, float, int]] = deque()
        self._masked = tuple(sorted(self._stop_tokens | (frozenset() if job.stopping.ignore_eos else eos_token_ids)))
        self.num_tokens = 0
        self._logprob = 0.0
        self._sampling_logprob = 0.0

    @property
    def limit(self) -> int:
        """Most tokens this completion may have."""
        return self._limit

    def next_draw(self) -> Draw:
        """How the next token is drawn. Tokens that would end the completion are masked until `min_tokens`."""
        return Draw(
            options=self._sampling,
            seed=self._sampling.seed + self._index,
            position=self.num_tokens,
            adjustment=self._adjustment,
            masked_ids=self._masked if self.num_tokens < self._stopping.min_tokens else (),
        )

    def accept(
        self, position: PositionLogprobs, sampling_logprob: float, set_size: int, vocabulary: TokenBytes
    ) -> list[Event]:
        """Takes a drawn token; the last event tells whether it was the completion's last."""
        token_id, logprob = position.token_id, position.logprob
        assert token_id is not None
        assert logprob is not None
        self.num_tokens += 1
        if self._adjustment is not None:
            self._adjustment.count(token_id)
        self._logprob += logprob
        self._sampling_logprob += sampling_logprob
        self._waiting.append((position, sampling_logprob, set_size))
        is_eos = token_id in self._eos and not self._stopping.ignore_eos
        if is_eos or token_id in self._stop_tokens:
            keep = self._stopping.include
            token_bytes = vocabulary.spelled(token_id) if keep else vocabulary.token_bytes(token_id)
            delta = self._text.push_stop_token(token_bytes, keep)
            if is_eos:
                return self._events(delta, FinishReason.END_OF_SEQUENCE)
            return self._events(delta, FinishReason.STOP_TOKEN, stop_token_id=token_id)
        token_bytes = vocabulary.token_bytes(token_id)
        delta = self._text.push(token_bytes, match_stops=self.num_tokens > self._stopping.min_tokens)
        if delta.stop is not None:
            return self._events(delta, FinishReason.STOP_STRING, stop_string=delta.stop)
        if self.num_tokens == self._limit:
            rest = self._text.flush()
            both = Delta(placed=delta.placed + rest.placed, text=delta.text + rest.text, stop=None)
            return self._events(both, self._limit_reason)
        return self._events(delta, None)

    def end(self, reason: FinishReason) -> list[Event]:
        """Ends it where it is."""
        return self._events(self._text.flush(), reason)

    def _events(
        self,
        delta: Delta,
        reason: FinishReason | None,
        *,
        stop_string: str | None = None,
        stop_token_id: int | None = None,
    ) -> list[Event]:
        events: list[Event] = []
        if delta.placed or delta.text:
            events.append(
                CompletionDecoded(
                    index=self._index,
                    tokens=[self._decoded(placed, *self._waiting.popleft()) for placed in delta.placed],
                    text=delta.text,
                )
            )
        if reason is not None:
            assert not self._waiting
            events.append(self._finished(reason, stop_string, stop_token_id))
        return events

    def _decoded(self, placed: Any, position: PositionLogprobs, sampling_logprob: float, size: int) -> DecodedToken:
        return DecodedToken(
            position=position,
            sampling_logprob=sampling_logprob,
            sampling_set_size=size,
            bytes=placed.bytes,
            byte_offset=placed.byte_offset,
            code_point_offset=placed.code_point_offset,
            trimmed=placed.trimmed,
        )

    def _finished(self, reason: FinishReason, stop_string: str | None, stop_token_id: int | None) -> CompletionFinished:
        return CompletionFinished(
            index=self._index,
            reason=reason,
            token_count=self.num_tokens,
            byte_count=self._text.byte_count,
            logprob=self._logprob,
            sampling_logprob=self._sampling_logprob,
            stop_string=stop_string,
            stop_token_id=stop_token_id,
        )


class JobState:
    """A submitted job: its root, its branches alive and to come, and the events it has not told yet."""

    def __init__(self, ticket: Ticket) -> None:
        self.ticket = ticket
        self.job = ticket.job
        self.root: Sequence | None = None
        self.branches: set[Sequence] = set()
        self.next_branch = 0
        self.events: list[Event] = []

    @property
    def prefix(self) -> tuple[int, ...]:
        """Tokens that all branches start with."""
        return self.job.prefix if isinstance(self.job, ScoreJob) else self.job.prompt

    @property
    def options(self) -> LogprobOptions:
        """What is told of the branches' positions."""
        return self.job.logprobs

    @property
    def deadline_s(self) -> float | None:
        """When the job ends with what there is; None if it may take any time."""
        return self.job.stopping.deadline_s if isinstance(self.job, GenerateJob) else None

    @property
    def next_options(self) -> LogprobOptions | None:
        """What is told of the token after each continuation; None tells nothing of it."""
        return self.job.next_logprobs if isinstance(self.job, ScoreJob) else None

    @property
    def branch_count(self) -> int:
        """Branches in all."""
        if isinstance(self.job, ScoreJob):
            return len(self.job.continuations)
        return self.job.completion_count

    @cached_property
    def adjustment(self) -> JobAdjustment | None:
        """What bias and penalties do to the logits of its completions; None if nothing."""
        if isinstance(self.job, ScoreJob):
            return None
        sampling = self.job.sampling
        return JobAdjustment(sampling, self.job.prompt) if sampling.penalizes or sampling.logit_bias else None

    @property
    def awaits_branches(self) -> bool:
        """Whether branches are still to start and could: what they start from is computed."""
        return self.next_branch < self.branch_count and (self.root is None or self.root.num_pending == 0)

    @property
    def done(self) -> bool:
        """Whether every branch has ended."""
        return self.root is None and not self.branches and self.next_branch == self.branch_count

    def continuation(self, branch: int) -> Continuation | None:
        """The tokens a branch starts with besides the prefix; None for a completion."""
        return self.job.continuations[branch] if isinstance(self.job, ScoreJob) else None

    def most_tokens(self, context_length: int) -> int:
        """Tokens that the longest branch may come to compute, prefix included."""
        if isinstance(self.job, ScoreJob):
            return len(self.prefix) + max(len(c.token_ids) for c in self.job.continuations)
        return min(len(self.prefix) + self.job.max_tokens, context_length)
