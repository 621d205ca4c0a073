"""Counts the places and blocks that are free, and those that are kept for what has still to start. No tensors.

It only reads: what enters, runs and ends is the scheduler's to say.
"""

from __future__ import annotations

from logprobs_server.engine.kv_cache import BLOCK_SIZE, BlockPool, blocks_for
from logprobs_server.engine.sequences import JobState, Sequence
from logprobs_server.engine.types import GenerateJob

__all__ = ["Room"]


class Room:
    """What the scheduler's jobs and sequences, whose lists it sees, leave for others.

    `ahead` are, wherever it is asked for, the jobs whose branches to come are to find their places and blocks first.
    """

    def __init__(
        self,
        pool: BlockPool,
        jobs: list[JobState],
        sequences: list[Sequence],
        *,
        max_sequences: int,
        context_length: int,
    ) -> None:
        self._pool = pool
        self._jobs = jobs
        self._sequences = sequences
        self._max_sequences = max_sequences
        self._context_length = context_length

    def needs(self, job: JobState) -> int:
        """Blocks that one branch of the job, or all its beams, and its root hold together."""
        return blocks_for(len(job.prefix)) + self.own_blocks(job)

    def own_blocks(self, job: JobState) -> int:
        """Blocks that one branch, or all beams, hold besides those shared with the root."""
        own = blocks_for(job.most_tokens(self._context_length)) - len(job.prefix) // BLOCK_SIZE
        return own * max(job.num_beams, 1)

    def found(self, job: JobState) -> tuple[list[int], int]:
        """Known blocks that a job's root can start with, and what stands for all they hold."""
        return self._pool.find(job.prefix, _num_findable(job))

    def for_job(self, job: JobState, ahead: list[JobState]) -> bool:
        """Whether a job may enter: its root and one branch fit, and no job ahead computes what it starts with."""
        return (
            self.needs(job) <= self._num_free(ahead)
            and self._has_place(job, ahead)
            and not any(self._computes_start(other.root, job) for other in ahead if other.root is not None)
        )

    def for_branch(self, job: JobState, ahead: list[JobState]) -> bool:
        """Whether one more branch of a job that has entered, or all its beams, fit."""
        return self._has_place(job, ahead) and self.own_blocks(job) <= self._num_free(ahead)

    def _computes_start(self, root: Sequence, job: JobState) -> bool:
        """Whether a root will soon hold the first block of the job's prefix that the pool does not know yet."""
        if root.num_pending == 0:
            return False
        stop = BLOCK_SIZE * (1 + len(self.found(job)[0]))
        return stop <= BLOCK_SIZE * _num_findable(job) and root.token_ids[:stop] == list(job.prefix[:stop])

    def _has_place(self, job: JobState, ahead: list[JobState]) -> bool:
        """Whether one more sequence of the job may live, or all its beams, which keep their places from the start.

        A computed root waits for its branches and takes no place; a root that is being computed has that of the first.
        """
        alive = sum(s.branch is not None or s.num_pending > 0 for s in self._sequences if not s.job.num_beams)
        kept = sum(other.num_beams for other in self._jobs if other is not job)
        to_come = sum(
            other.branch_count - other.next_branch - (other.root is not None and other.root.num_pending > 0)
            for other in ahead
            if not other.num_beams
        )
        return alive + kept + to_come + max(job.num_beams, 1) <= self._max_sequences

    def _num_free(self, ahead: list[JobState]) -> int:
        """Blocks that nobody holds and that are kept neither for beams nor for the branches to come of those ahead."""
        kept = sum(self._num_kept(job) for job in self._jobs if job.search is not None)
        to_come = sum((job.branch_count - job.next_branch) * self.own_blocks(job) for job in ahead)
        return self._pool.num_free - kept - to_come

    def _num_kept(self, job: JobState) -> int:
        """Blocks that the beams of a job may still come to hold."""
        shared = len(job.prefix) // BLOCK_SIZE
        return self.own_blocks(job) - len({block for beam in job.branches for block in beam.blocks[shared:]})


def _num_findable(job: JobState) -> int:
    """Full blocks that a job's root need not compute if they are known. It computes the last token, because branches
    start from its hidden state, and all that are reported."""
    if isinstance(job.job, GenerateJob) and job.job.prompt_logprobs is not None:
        return 0
    return max(0, len(job.prefix) - 1) // BLOCK_SIZE
