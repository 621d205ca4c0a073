"""Decides what each step computes: iteration-level batching (Orca, OSDI 2022) with chunked prefill. No tensors.

Jobs enter in the order they came. A sequence gets all the blocks it may ever need when it starts, so nothing
is ever taken back from it; a job enters only beside room for all branches that those before it have still to start, so
the blocks that running sequences free always reach the oldest job that waits for some. It also waits while another
computes what it starts with: then that is found. Beams of a search share blocks and take new ones as they grow, but as
many as they could ever need are kept for them.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from math import ceil

from logprobs_server.engine.beams import BeamSearch
from logprobs_server.engine.completion import Completion
from logprobs_server.engine.events import FinishReason, JobStarted
from logprobs_server.engine.kv_cache import BLOCK_SIZE, BlockPool, blocks_for
from logprobs_server.engine.room import Room
from logprobs_server.engine.sequences import JobState, Sequence
from logprobs_server.engine.types import GenerateJob, TokenBytes

__all__ = ["LEAST_PREFILL", "Scheduler", "SchedulerLimits", "StartedBranch", "Work"]

LEAST_PREFILL = 20
"""Prompt tokens computed in a step beside decoding sequences, for each prompt that waits, at a pace of 1."""
_PREFILL_PER_DECODE = 2
"""Those computed at most for each decoding sequence: a step then takes about three times what it takes without."""
_FAR = 2048
"""Tokens before a prompt's token that make it cost twice what the first one does, at a pace of 1."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerLimits:
    """How much runs at once.

    max_sequences: sequences alive at once.
    max_step_tokens: tokens computed in a step; every decoding sequence gets its token, prefill shares the rest.
    prompt_pace: prompt tokens that take as long as a decoded one. So that sequences that decode are not held up, a step
        beside them computes few: `_PREFILL_PER_DECODE` for each of them at most, `LEAST_PREFILL` for each prompt that
        waits, times the pace. The bound rises where more wait than sequences decode, so that the many do not wait for
        the few. All this is of tokens that start a prompt; far into one they are fewer, since each attends to all
        before it. None: as many as fit the step.
    """

    max_sequences: int
    max_step_tokens: int
    context_length: int
    prompt_pace: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """Tokens start … stop - 1 of a sequence, to be computed in this step."""

    sequence: Sequence
    start: int
    stop: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StartedBranch:
    """A new branch, the root it starts from, and the block (from, to) whose contents must be copied before it runs."""

    sequence: Sequence
    root: Sequence | None
    copied_block: tuple[int, int] | None


class Scheduler:
    """Keeps the queue, the running sequences and the blocks."""

    def __init__(self, limits: SchedulerLimits, pool: BlockPool, eos_token_ids: frozenset[int]) -> None:
        self._limits = limits
        self._pool = pool
        self._eos = eos_token_ids
        self._waiting: deque[JobState] = deque()
        self._jobs: list[JobState] = []
        self._sequences: list[Sequence] = []
        self._room = Room(
            pool,
            self._jobs,
            self._sequences,
            max_sequences=limits.max_sequences,
            context_length=limits.context_length,
        )

    @property
    def num_waiting(self) -> int:
        """Jobs in the queue."""
        return len(self._waiting)

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do."""
        return not self._waiting and not self._jobs

    @property
    def jobs(self) -> list[JobState]:
        """Jobs that have entered, oldest first."""
        return list(self._jobs)

    def needs(self, job: JobState) -> int:
        """Blocks that one branch of the job, or all its beams, and its root hold together."""
        return self._room.needs(job)

    def add(self, job: JobState) -> None:
        """Puts a job at the end of the queue."""
        self._waiting.append(job)

    def remove(self, job: JobState) -> None:
        """Forgets a job, wherever it is, and frees what it holds."""
        if job in self._waiting:
            self._waiting.remove(job)
        if job in self._jobs:
            self._jobs.remove(job)
            for sequence in [s for s in self._sequences if s.job is job]:
                self.retire(sequence)

    def expire(self, job: JobState, vocabulary: TokenBytes) -> None:
        """Ends a job whose time is up with what there is of it: completions where they are, others empty."""
        if job in self._waiting:
            job.events.append(JobStarted(cached_token_count=0))
        if job.num_beams:
            job.events += (job.search or self._search(job)).end(FinishReason.TIME_LIMIT, vocabulary)
        else:
            self._end_completions(job)
        self.remove(job)
        job.next_branch = job.branch_count

    def admit(self) -> None:
        """Lets jobs in while their root and one branch fit."""
        while self._waiting and self._room.for_job(job := self._waiting[0], self._awaiting()):
            self._jobs.append(self._waiting.popleft())
            cached = self._start_root(job) if job.prefix else 0
            job.events.append(JobStarted(cached_token_count=cached))

    def start_branches(self) -> list[StartedBranch]:
        """Starts as many branches as there is room for, of the jobs whose root is computed."""
        started = []
        awaiting = self._awaiting()
        for place, job in enumerate(awaiting):
            ahead = awaiting[:place]
            while job.awaits_branches and self._room.for_branch(job, ahead):
                started.append(self._start_branch(job))
        return started

    def retire_roots(self) -> None:
        """Ends the roots that all branches have started from."""
        for job in self.jobs:
            if job.root is not None and job.next_branch == job.branch_count:
                self.retire(job.root)

    def schedule(self) -> list[Work]:
        """What the next step computes: one token of every decoding sequence, then prompts in the order they came."""
        work = [_all_of(s) for s in self._sequences if s.decodes and s.num_pending == 1]
        room = self._limits.max_step_tokens - len(work)
        far = float("inf")  # without decoding sequences nobody minds what a token costs
        if work and (pace := self._limits.prompt_pace) is not None:
            far = _FAR / pace
            wanted, decoding = pace * LEAST_PREFILL * self._num_prompts, len(work)
            most = max(pace * _PREFILL_PER_DECODE * decoding, 2 * wanted // decoding)
            room = min(room, max(pace * LEAST_PREFILL, min(wanted, most)))
        for sequence in self._sequences:
            pending = sequence.num_pending
            if pending and not (sequence.decodes and pending == 1) and room > 0:
                start = sequence.num_computed
                cost = 1 + start / far
                count = min(pending, ceil(room / cost))
                work.append(Work(sequence=sequence, start=start, stop=start + count))
                room -= int(count * cost)
        return work

    def computed(self, work: Work) -> None:
        """Notes that a part of a schedule is computed, and makes the blocks known that are full now."""
        sequence = work.sequence
        sequence.num_computed = work.stop
        for index in range(sequence.num_known, work.stop // BLOCK_SIZE):
            token_ids = tuple(sequence.token_ids[index * BLOCK_SIZE : (index + 1) * BLOCK_SIZE])
            sequence.chain = self._pool.remember(sequence.blocks[index], sequence.chain, token_ids)
            sequence.num_known = index + 1

    def retire(self, sequence: Sequence) -> None:
        """Ends a sequence and gives its blocks back."""
        self._sequences.remove(sequence)
        self._pool.release(sequence.blocks)
        if sequence.job.root is sequence:
            sequence.job.root = None
        sequence.job.branches.pop(sequence, None)
        if sequence.job.done and sequence.job in self._jobs:
            self._jobs.remove(sequence.job)

    def extend_beams(self, job: JobState, chosen: list[tuple[int, int]]) -> list[tuple[int, int]]:
        """Makes these the beams of a job: (number of the beam that goes on, next token id); without any it ends.

        Of those that go on from one beam the first takes its place. The others share its full blocks.

        Returns:
            The blocks (from, to) whose contents must be copied before the next step.
        """
        before = list(job.branches)
        parents = {before[number] for number, _ in chosen}
        for beam in before:
            if beam not in parents:
                self.retire(beam)
        copies: list[tuple[int, int]] = []
        beams = []
        for number, _ in chosen:
            beam = before[number]
            beams.append(beam if beam in parents else self._fork(beam, copies))
            parents.discard(beam)
        for beam, (_, token_id) in zip(beams, chosen, strict=True):
            beam.token_ids.append(token_id)
            beam.goal += 1
            beam.blocks += self._pool.allocate(blocks_for(beam.goal) - len(beam.blocks))
        job.branches = dict.fromkeys(beams)
        return copies

    def _fork(self, beam: Sequence, copies: list[tuple[int, int]]) -> Sequence:
        """Another sequence that goes on from a beam; notes the block, if any, that it needs a copy of."""
        full = beam.blocks[: beam.num_computed // BLOCK_SIZE]
        self._pool.share(full)
        own = self._pool.allocate(len(beam.blocks) - len(full))
        copies += zip(beam.blocks[len(full) :], own, strict=True)
        other = Sequence(
            beam.job, beam.branch, beam.token_ids.copy(), full + own, computed=beam.num_computed, goal=beam.goal
        )
        other.num_known, other.chain = beam.num_known, beam.chain
        self._sequences.append(other)
        return other

    def _end_completions(self, job: JobState) -> None:
        """Ends the completions of a job where they are; those that have not started are empty."""
        started = {sequence.branch: sequence.completion for sequence in job.branches}
        for index in sorted([*(b for b in started if b is not None), *range(job.next_branch, job.branch_count)]):
            completion = started.get(index) or self._completion(job, index)
            job.events += completion.end(FinishReason.TIME_LIMIT)

    def _awaiting(self) -> list[JobState]:
        """Jobs that have entered and still have branches to start."""
        return [job for job in self._jobs if job.next_branch < job.branch_count]

    @property
    def _num_prompts(self) -> int:
        """Prompts that completions wait for."""
        roots = [job.root for job in self._jobs if isinstance(job.job, GenerateJob)]
        return sum(root is not None and root.num_pending > 0 for root in roots)

    def _start_root(self, job: JobState) -> int:
        """Starts a job's root; returns how many of its tokens are computed already."""
        options = job.job.prompt_logprobs if isinstance(job.job, GenerateJob) else None
        prefix = list(job.prefix)
        found, chain = self._room.found(job)
        self._pool.share(found)
        blocks = found + self._pool.allocate(blocks_for(len(prefix)) - len(found))
        root = Sequence(job, None, prefix, blocks, computed=len(found) * BLOCK_SIZE, goal=len(prefix))
        root.num_known, root.chain = len(found), chain
        if options is not None:
            root.targets_from = 0
            root.options = options
        job.root = root
        self._sequences.append(root)
        return root.num_computed

    def _start_branch(self, job: JobState) -> StartedBranch:
        shared = job.root.blocks[: len(job.prefix) // BLOCK_SIZE] if job.root else []
        self._pool.share(shared)
        partial = len(job.prefix) % BLOCK_SIZE > 0
        own = self._pool.allocate(int(partial) if job.num_beams else self._room.own_blocks(job))
        copied = None
        if job.root is not None and partial:
            copied = (job.root.blocks[len(shared)], own[0])
        return StartedBranch(sequence=self._new_branch(job, shared + own), root=job.root, copied_block=copied)

    def _new_branch(self, job: JobState, blocks: list[int]) -> Sequence:
        index, prefix = job.next_branch, len(job.prefix)
        continuation = job.continuation(index)
        token_ids = list(job.prefix) + list(continuation.token_ids if continuation else ())
        # Nothing follows the last token of a continuation, so it is computed only if what would follow is asked for.
        goal = len(token_ids) if continuation is None or job.next_options else max(prefix, len(token_ids) - 1)
        branch = Sequence(job, index, token_ids, blocks, computed=prefix, goal=goal)
        if job.root is not None:
            branch.num_known, branch.chain = job.root.num_known, job.root.chain
        if continuation is not None:
            branch.targets_from = prefix + continuation.scored_from
        elif job.num_beams:
            job.search = self._search(job)
        else:
            branch.completion = self._completion(job, index)
        job.next_branch += 1
        job.branches[branch] = None
        self._sequences.append(branch)
        return branch

    def _completion(self, job: JobState, index: int) -> Completion:
        assert isinstance(job.job, GenerateJob)
        room = self._limits.context_length - len(job.prefix)
        return Completion(job.job, index, self._eos, room, job.adjustment)

    def _search(self, job: JobState) -> BeamSearch:
        assert isinstance(job.job, GenerateJob)
        assert job.job.beams is not None
        completions = [self._completion(job, index) for index in range(job.num_beams)]
        return BeamSearch(job.job, job.job.beams, completions, self._eos)


def _all_of(sequence: Sequence) -> Work:
    return Work(sequence=sequence, start=sequence.num_computed, stop=sequence.goal)
