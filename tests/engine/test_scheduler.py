"""Whatever is asked for, in whatever order, with however little room: every job gets its turn and gives all back."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from random import Random

import pytest
from fakes import EOS, ByteVocabulary, generate_job
from hypothesis import given
from hypothesis import strategies as st
from logprobs_server.engine.events import CompletionFinished, FinishReason, JobStarted
from logprobs_server.engine.kv_cache import BLOCK_SIZE, BlockPool
from logprobs_server.engine.scheduler import LEAST_PREFILL, Scheduler, SchedulerLimits, Work
from logprobs_server.engine.sequences import JobState, Sequence
from logprobs_server.engine.types import (
    BeamOptions,
    Continuation,
    EarlyStopping,
    GenerateJob,
    Job,
    LogprobOptions,
    ScoreJob,
    Ticket,
)

CONTEXT = 80
LENGTHS = st.integers(0, 40)
FIRST_IDS = st.sampled_from((0, 500))  # whether jobs start alike
BEAMS = BeamOptions(length_penalty=1.0, early_stopping=EarlyStopping.HEURISTIC, told=1)
GENERATE_JOBS = st.builds(
    lambda first, prompt, most, count: generate_job(range(first, first + 1 + prompt), max_tokens=most, count=count),
    FIRST_IDS,
    LENGTHS,
    st.integers(0, 30),
    st.integers(1, 5),
)
BEAM_JOBS = GENERATE_JOBS.map(lambda job: replace(job, max_tokens=max(1, job.max_tokens), beams=BEAMS))
COMPLETING_JOBS = GENERATE_JOBS | BEAM_JOBS
SCORE_JOBS = st.builds(
    lambda first, prefix, lengths, following: ScoreJob(
        prefix=tuple(range(first, first + prefix)),
        continuations=tuple(Continuation(token_ids=tuple(range(length))) for length in lengths),
        logprobs=LogprobOptions(),
        next_logprobs=LogprobOptions() if following else None,
    ),
    FIRST_IDS,
    LENGTHS,
    st.lists(LENGTHS, min_size=1, max_size=5),
    st.booleans(),
)
JOBS = st.lists(COMPLETING_JOBS | SCORE_JOBS, min_size=1, max_size=8)
SEQUENCES = st.integers(1, 4)
SPARE_TOKENS = st.integers(0, 40)
SPARE_BLOCKS = st.integers(0, 10)
CHANCE = st.randoms(use_true_random=False)


def scheduler_with(decoding: int, prompts: int, pace: int | None = 1) -> Scheduler:
    """A scheduler in which so many sequences decode and so many prompts of 900 tokens wait."""
    limits = SchedulerLimits(max_sequences=40, max_step_tokens=512, context_length=1000, prompt_pace=pace)
    scheduler = Scheduler(limits, BlockPool(2000), frozenset({EOS}))
    if decoding:
        scheduler.add(JobState(Ticket(generate_job(range(9), max_tokens=5, count=decoding), lambda events: None)))
        scheduler.admit()
        for part in scheduler.schedule():
            scheduler.computed(part)
        for branch in scheduler.start_branches():
            branch.sequence.token_ids.append(0)
            branch.sequence.goal += 1
    for number in range(prompts):
        prompt = range(1000 * number, 1000 * number + 900)
        scheduler.add(JobState(Ticket(generate_job(prompt, max_tokens=5), lambda events: None)))
    scheduler.admit()
    return scheduler


@pytest.mark.parametrize(
    ("decoding", "prompts", "pace", "most"),
    [
        (0, 1, 1, 512),
        (1, 1, 1, LEAST_PREFILL),
        (20, 1, 1, LEAST_PREFILL),
        (20, 2, 1, 40),
        (30, 6, 1, 60),
        (2, 6, 1, 6 * LEAST_PREFILL),
        (1, 30, 1, 511),
        (20, 1, 3, 3 * LEAST_PREFILL),
        (30, 6, 3, 180),
        (20, 2, None, 492),
    ],
)
def test_prompts_hold_decoding_sequences_up_only_as_far_as_more_wait_for_them(
    decoding: int, prompts: int, pace: int | None, most: int
) -> None:
    work = scheduler_with(decoding, prompts, pace).schedule()
    assert [part.stop - part.start for part in work] == [*[1] * decoding, most]


def test_a_step_takes_up_fewer_tokens_of_a_prompt_the_further_it_is_in() -> None:
    scheduler, counts = scheduler_with(decoding=16, prompts=1), []
    while (part := scheduler.schedule()[-1]).stop < 900:
        counts.append(part.stop - part.start)
        scheduler.computed(part)
    assert counts == sorted(counts, reverse=True)
    assert counts[0] == LEAST_PREFILL
    assert 0.65 < counts[-1] / counts[0] < 0.75  # at 900 tokens one costs 1.44 times what the first one does


def test_prompts_that_come_together_are_computed_together() -> None:
    driver = Driver([generate_job(range(first, first + 20)) for first in (0, 100, 200)], 3, 60, 9, Random(0))
    driver.step(lambda sequence: True)
    assert [state.next_branch for state in driver.states] == [1, 1, 1]


def test_a_prompt_waits_while_another_computes_what_it_starts_with() -> None:
    prompts = [range(3 * BLOCK_SIZE), [*range(2 * BLOCK_SIZE), *range(100, 120)]]
    driver = Driver([generate_job(prompt) for prompt in prompts], 3, 100, 9, Random(0))
    driver.step(lambda sequence: True)
    assert driver.states[1].root is None
    driver.step(lambda sequence: True)
    assert driver.states[1].events[0] == JobStarted(cached_token_count=2 * BLOCK_SIZE)


class Driver:
    """Does what the engine does with a schedule, without a model: completions end after as many tokens as told.

    Tokens and beams that go on are drawn by chance. Checks at every step that something happens, that limits hold, and
    that each sequence finds in its blocks the tokens it has computed: blocks hold tokens in place of keys and values.
    """

    def __init__(self, jobs: list[Job], sequences: int, spare_tokens: int, spare_blocks: int, chance: Random) -> None:
        self.states = [JobState(Ticket(job, lambda events: None)) for job in jobs]
        sequences = max(sequences, *(state.num_beams for state in self.states))
        limits = SchedulerLimits(
            max_sequences=sequences, max_step_tokens=sequences + spare_tokens, context_length=CONTEXT
        )
        needed = max(Scheduler(limits, BlockPool(2), frozenset()).needs(state) for state in self.states)
        self.pool = BlockPool(max(needed, 1) + spare_blocks + 1)
        self.limits = limits
        self.chance = chance
        self.scheduler = Scheduler(limits, self.pool, frozenset({EOS}))
        self.memory: dict[int, list[int]] = defaultdict(lambda: [-1] * BLOCK_SIZE)
        self.ended: list[tuple[JobState, int]] = []
        for state in self.states:
            self.scheduler.add(state)

    @property
    def alive(self) -> list[Sequence]:
        """Branches that run."""
        return [branch for state in self.states for branch in state.branches]

    def step(self, wants_more: Callable[[Sequence], bool]) -> None:
        """One step; `wants_more` tells whether a completion, or a search, goes on after the token it just drew."""
        self.scheduler.admit()
        work = self.scheduler.schedule()
        assert sum(part.stop - part.start for part in work) <= self.limits.max_step_tokens
        assert len({part.sequence for part in work}) == len(work)
        for part in work:
            self._compute(part)
        drawing = [s for s in self.alive if s.completion is not None and s.num_pending == 0]
        started = self.scheduler.start_branches()
        assert work or started, "nothing happens although there are jobs"
        self._copy([branch.copied_block for branch in started if branch.copied_block])
        assert len(self.alive) <= self.limits.max_sequences
        self.scheduler.retire_roots()
        for sequence in drawing + [branch.sequence for branch in started if branch.sequence.completion is not None]:
            self._draw(sequence, wants_more)
        for job in [state for state in self.states if state.num_beams and state.branches]:
            self._extend(job, wants_more)
        for sequence in [s for s in self.alive if not s.decodes and s.num_pending == 0]:
            self._retire(sequence)

    def run(self, wants_more: Callable[[Sequence], bool]) -> None:
        """Steps until all is done."""
        while not self.scheduler.idle:
            self.step(wants_more)

    def _compute(self, part: Work) -> None:
        sequence = part.sequence
        assert sequence.num_computed == part.start < part.stop <= sequence.goal
        for index in range(part.start, part.stop):
            self.memory[sequence.blocks[index // BLOCK_SIZE]][index % BLOCK_SIZE] = sequence.token_ids[index]
        self.scheduler.computed(part)
        held = [token_id for block in sequence.blocks for token_id in self.memory[block]]
        assert held[: part.stop] == sequence.token_ids[: part.stop], "a block was used twice, or not copied"

    def _copy(self, blocks: list[tuple[int, int]]) -> None:
        for source, target in blocks:
            self.memory[target] = self.memory[source].copy()

    def _draw(self, sequence: Sequence, wants_more: Callable[[Sequence], bool]) -> None:
        assert sequence.completion is not None
        drawn = len(sequence.token_ids) - len(sequence.job.prefix) + 1
        if drawn < sequence.completion.limit and wants_more(sequence):
            sequence.token_ids.append(self._any_token())
            sequence.goal += 1
        else:
            self._retire(sequence)

    def _extend(self, job: JobState, wants_more: Callable[[Sequence], bool]) -> None:
        beams = list(job.branches)
        assert not any(beam.num_pending for beam in beams), "a step left a beam behind"
        chosen = []
        if len(beams[0].token_ids) + 1 < job.most_tokens(CONTEXT) and wants_more(beams[0]):
            count = self.chance.randint(1, job.num_beams)
            chosen = [(self.chance.randrange(len(beams)), self._any_token()) for _ in range(count)]
        else:
            self.ended.append((job, 0))
        self._copy(self.scheduler.extend_beams(job, chosen))

    def _retire(self, sequence: Sequence) -> None:
        assert sequence.branch is not None
        self.ended.append((sequence.job, sequence.branch))
        self.scheduler.retire(sequence)

    def _any_token(self) -> int:
        return self.chance.randrange(EOS)


@given(JOBS, SEQUENCES, SPARE_TOKENS, SPARE_BLOCKS, CHANCE)
def test_every_branch_of_every_job_runs_to_its_end_and_all_blocks_come_back(
    jobs: list[Job], sequences: int, spare_tokens: int, spare_blocks: int, chance: Random
) -> None:
    driver = Driver(jobs, sequences, spare_tokens, spare_blocks, chance)
    driver.run(lambda sequence: chance.random() < 0.9)
    assert len(driver.ended) == len(set(driver.ended)) == sum(state.branch_count for state in driver.states)
    assert all(state.done for state in driver.states)
    assert driver.pool.num_free == driver.pool.num_blocks


@given(JOBS, SEQUENCES, SPARE_TOKENS, SPARE_BLOCKS, CHANCE, st.data())
def test_a_removed_job_gives_all_back_and_the_others_run_to_their_end(
    jobs: list[Job], sequences: int, spare_tokens: int, spare_blocks: int, chance: Random, data: st.DataObject
) -> None:
    driver = Driver(jobs, sequences, spare_tokens, spare_blocks, chance)
    removed = data.draw(st.sampled_from(driver.states))
    for _ in range(data.draw(st.integers(0, 20))):
        if not driver.scheduler.idle:
            driver.step(lambda sequence: True)
    driver.scheduler.remove(removed)
    driver.run(lambda sequence: True)
    assert all(state.done for state in driver.states if state is not removed)
    assert driver.pool.num_free == driver.pool.num_blocks


@given(st.lists(COMPLETING_JOBS, min_size=1, max_size=8), SEQUENCES, SPARE_TOKENS, SPARE_BLOCKS, CHANCE, st.data())
def test_an_expired_job_tells_every_completions_end_and_the_others_run_to_theirs(
    jobs: list[Job], sequences: int, spare_tokens: int, spare_blocks: int, chance: Random, data: st.DataObject
) -> None:
    driver = Driver(jobs, sequences, spare_tokens, spare_blocks, chance)
    late = data.draw(st.sampled_from(driver.states))
    for _ in range(data.draw(st.integers(0, 20))):
        if not driver.scheduler.idle:
            driver.step(lambda sequence: True)
    if not late.done:
        ended = {branch for state, branch in driver.ended if state is late}
        driver.scheduler.expire(late, ByteVocabulary())
        finished = [event for event in late.events if isinstance(event, CompletionFinished)]
        assert [event.index for event in finished] == sorted(set(range(late.num_beams or late.branch_count)) - ended)
        assert all(event.reason is FinishReason.TIME_LIMIT for event in finished)
        assert [type(event) for event in late.events].count(JobStarted) == 1
    assert late.done
    driver.run(lambda sequence: True)
    assert all(state.done for state in driver.states)
    assert driver.pool.num_free == driver.pool.num_blocks


@given(st.lists(COMPLETING_JOBS, min_size=2, max_size=6), SEQUENCES, SPARE_BLOCKS, CHANCE)
def test_jobs_start_in_the_order_they_came(
    jobs: list[GenerateJob], sequences: int, spare_blocks: int, chance: Random
) -> None:
    driver = Driver([replace(job, max_tokens=5) for job in jobs], sequences, 20, spare_blocks, chance)
    started: list[JobState] = []
    while not driver.scheduler.idle:
        driver.step(lambda sequence: True)
        started += [state for state in driver.states if state.next_branch and state not in started]
    assert started == driver.states


def test_decoding_sequences_get_their_token_before_any_prompt_goes_on() -> None:
    jobs: list[Job] = [generate_job(range(4), max_tokens=9), generate_job(range(60))]
    driver = Driver(jobs, sequences=2, spare_tokens=6, spare_blocks=9, chance=Random(0))
    driver.step(lambda sequence: True)
    decoding = driver.alive[0]
    while driver.states[1].root is not None:
        driver.scheduler.admit()
        work = driver.scheduler.schedule()
        assert work[0].sequence is decoding
        driver.step(lambda sequence: True)
