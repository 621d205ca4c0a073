"""Sequences and the jobs they belong to: the engine's state between steps. No tensors but kept hidden states.

A job computes its prefix (prompt or context) once, as the *root* sequence; *branches* (continuations to score,
completions to draw) start where the root ends and share its blocks. The beams of a search are its branches too.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from logprobs_server.engine.adjustment import JobAdjustment
from logprobs_server.engine.beams import BeamSearch
from logprobs_server.engine.completion import Completion
from logprobs_server.engine.events import Event
from logprobs_server.engine.sampling import Draw
from logprobs_server.engine.types import Continuation, GenerateJob, LogprobOptions, ScoreJob, Ticket

__all__ = ["JobState", "Row", "Sequence"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One distribution wanted of a step.

    token_id: the token to report, None if it is to be drawn or nobody chose it.
    draw: how to draw it, None if it is not drawn.
    candidates: how many of the most probable tokens a beam search wants to choose from.
    """

    sequence: Sequence
    options: LogprobOptions
    token_id: int | None = None
    draw: Draw | None = None
    candidates: int = 0


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
        self.last_hidden: Any = None  # [1, hidden] of the token before the next one, while branches are to start here

    @property
    def num_pending(self) -> int:
        """Tokens that wait to be computed."""
        return self.goal - self.num_computed

    @property
    def decodes(self) -> bool:
        """Whether a step computes one token of it, from which another follows."""
        return self.completion is not None or (self.branch is not None and self.job.search is not None)

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
        if self.branch is not None and (search := self.job.search) is not None:
            return Row(sequence=self, options=self.options, candidates=search.width)
        if self.branch is not None and (options := self.job.next_options) is not None:
            return Row(sequence=self, options=options)
        return None


class JobState:
    """A submitted job: its root, its branches alive and to come, and the events it has not told yet.

    branches: in the order they started; the beams of a search best first.
    search: once it has started, of a job that searches with beams.
    """

    def __init__(self, ticket: Ticket) -> None:
        self.ticket = ticket
        self.job = ticket.job
        self.root: Sequence | None = None
        self.branches: dict[Sequence, None] = {}
        self.search: BeamSearch | None = None
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
        """Branches that start from the root; of a search the first beam does."""
        if isinstance(self.job, ScoreJob):
            return len(self.job.continuations)
        return 1 if self.num_beams else self.job.completion_count

    @property
    def num_beams(self) -> int:
        """Beams of its search, 0 if it is none."""
        return self.job.completion_count if isinstance(self.job, GenerateJob) and self.job.beams else 0

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
