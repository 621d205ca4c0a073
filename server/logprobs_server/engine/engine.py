"""The built-in engine: one thread that schedules, runs the model once, reduces, and publishes, step after step.

The only owner of the model, the scheduler and the sequences; other threads reach it through a queue of
commands. Knows nothing of gRPC.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from logprobs_server.engine.batch import Chunk, Model
from logprobs_server.engine.beams import BeamRow
from logprobs_server.engine.events import (
    CompletionFinished,
    ContinuationScored,
    Event,
    FinishReason,
    JobFailed,
    JobFinished,
    JobStarted,
    PositionLogprobs,
    PromptScored,
)
from logprobs_server.engine.kv_cache import BlockPool
from logprobs_server.engine.random import VocabularyNoise
from logprobs_server.engine.reduction import candidates_of, drawn_of, positions_of
from logprobs_server.engine.sampling import DrawnToken
from logprobs_server.engine.scheduler import Scheduler, SchedulerLimits, Work
from logprobs_server.engine.sequences import JobState, Row, Sequence
from logprobs_server.engine.transfer import sent
from logprobs_server.engine.types import EngineUnavailableError, Job, ModelDescription, Sink, Ticket, TokenBytes, Told

__all__ = ["TorchEngine", "tell_each"]

_log = logging.getLogger(__name__)

_SLICE_ELEMENTS, _GPU_SLICE_ELEMENTS = 12 << 20, 1 << 26
"""Logits reduced at a time: 48 MiB in float32, few enough to stay small, enough rows to keep the head a product. A GPU
has room for more, and its host waits for every slice."""


def tell_each(told: Told) -> None:
    """Calls sinks one after the other. One that raises is logged, and keeps nothing from the others."""
    for sink, events in told:
        try:
            sink(events)
        except Exception:
            _log.exception("events could not be delivered")


class TorchEngine:
    """Runs one model for many jobs at once. Implements `Engine`; start it with `start()`."""

    def __init__(
        self,
        model: Model,
        vocabulary: TokenBytes,
        *,
        max_sequences: int,
        max_step_tokens: int,
        max_queue: int,
        hand_over: Callable[[Told], None] = tell_each,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Takes a model of its own.

        Args:
            max_sequences, max_step_tokens: what a step computes at most. max_queue: jobs that wait at most.
            hand_over: has sinks take what a step gave; called on the engine's thread, must neither block nor raise.
        """
        self._model = model
        self._vocabulary = vocabulary
        self._max_queue = max_queue
        self._hand_over = hand_over
        self._clock = clock
        description = model.description
        limits = SchedulerLimits(
            max_sequences=max_sequences,
            max_step_tokens=max(max_step_tokens, max_sequences),
            context_length=description.context_length,
            prompt_pace=model.prompt_pace,
        )
        self._pool = BlockPool(model.num_blocks, sparing=model.device.type == "cpu")
        self._scheduler = Scheduler(limits, self._pool, frozenset(description.eos_token_ids))
        self._noise = VocabularyNoise(description.vocabulary_size, model.device)
        elements = _GPU_SLICE_ELEMENTS if model.device.type == "cuda" else _SLICE_ELEMENTS
        self._slice_rows = max(1, elements // description.vocabulary_size)
        self._states: dict[Ticket, JobState] = {}
        self._arriving: set[Ticket] = set()  # submitted, and not seen by the engine's thread yet
        self._commands: queue.SimpleQueue[tuple[str, Ticket | None]] = queue.SimpleQueue()
        self._untold: defaultdict[Ticket, list[Event]] = defaultdict(list)  # given, and not told yet
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        """Starts the engine's thread."""
        self._thread.start()

    @property
    def description(self) -> ModelDescription:
        """The model served."""
        return self._model.description

    @property
    def num_free_blocks(self) -> int:
        """Blocks of the KV cache that nobody holds; all of them when nothing runs."""
        return self._pool.num_free

    @property
    def num_blocks(self) -> int:
        """Blocks of the KV cache in all."""
        return self._pool.num_blocks

    def unfit(self, job: Job) -> str | None:
        """Why this engine could never do this job, whatever the load; None if it can."""
        needed = self._scheduler.needs(JobState(Ticket(job, _ignore)))
        if needed > self._pool.num_blocks:
            return f"needs {needed} blocks of KV cache, the server has {self._pool.num_blocks}"
        return None

    def submit(self, job: Job, sink: Sink) -> Ticket:
        """Queues a job.

        Raises:
            EngineUnavailableError: the queue is full, or the engine is closing.
        """
        if self._closing:
            raise EngineUnavailableError("the server is shutting down", reason="SHUTTING_DOWN", retry_after_s=None)
        if self._scheduler.num_waiting + len(self._arriving) >= self._max_queue:
            message = f"the queue is full: {self._max_queue} requests wait"
            raise EngineUnavailableError(message, reason="QUEUE_FULL", retry_after_s=1.0)
        ticket = Ticket(job, sink)
        self._arriving.add(ticket)
        self._commands.put(("submit", ticket))
        return ticket

    def cancel(self, ticket: Ticket) -> None:
        """Forgets a job within one step; no event follows. A job that has ended is left alone."""
        self._commands.put(("cancel", ticket))

    def close(self) -> None:
        """Ends the engine's thread; jobs under way fail."""
        self._closing = True
        self._commands.put(("close", None))
        if self._thread.is_alive():
            self._thread.join()

    @torch.inference_mode()  # once: to enter and leave it takes a step of one stream 40 us
    def _run(self) -> None:
        if self._model.own_threads:
            torch.set_num_threads(1)  # of this thread; two teams at once cost up to half of a step
        while self._receive():
            try:
                self._step()
            except Exception as error:  # whatever a step raises, callers are told and the next jobs go on
                _log.exception("a step failed")
                for state in self._scheduler.jobs:
                    self._fail(state, "ENGINE_FAILED", repr(error))
                self._tell()
        self._tell()
        for state in list(self._states.values()):
            self._fail(state, "SHUTTING_DOWN", "the engine was closed")
        self._tell()

    def _receive(self) -> bool:
        """Takes the commands that wait, or waits for one if there is nothing to do; False ends the thread."""
        while self._scheduler.idle or not self._commands.empty():
            if self._commands.empty():  # about to wait
                self._tell()
            command, ticket = self._commands.get()
            if ticket is None:
                return False
            if command == "submit":
                state = self._states[ticket] = JobState(ticket)
                self._scheduler.add(state)
                self._arriving.discard(ticket)
            else:
                self._untold.pop(ticket, None)
                if ticket in self._states:
                    self._scheduler.remove(self._states.pop(ticket))
        return True

    def _step(self) -> None:
        self._end_late_jobs()
        self._scheduler.admit()
        work = self._scheduler.schedule()
        self._tell()
        rows, hidden = self._compute(work)
        started, following = self._start_branches()
        rows += started
        hidden += following
        scored: defaultdict[Sequence, list[PositionLogprobs]] = defaultdict(list)
        beams: dict[Sequence, BeamRow] = {}
        for part, states in self._slices(rows, hidden):
            self._deliver(part, self._model.logits(states).float(), scored, beams)
        self._extend_beams(beams)
        self._publish(scored)

    def _end_late_jobs(self) -> None:
        """Ends the jobs whose time is up, those that wait too."""
        limited = [(state, state.deadline_s) for state in self._states.values() if state.deadline_s is not None]
        now = self._clock() if limited else 0.0
        for state, deadline_s in limited:
            if deadline_s <= now:
                self._scheduler.expire(state, self._vocabulary)

    def _compute(self, work: list[Work]) -> tuple[list[Row], list[Tensor]]:
        """Runs the model once over the work; returns the rows wanted of it, and their states [rows, hidden]."""
        if not work:
            return [], []
        chunks = [
            Chunk(token_ids=w.sequence.token_ids[w.start : w.stop], start=w.start, blocks=w.sequence.blocks)
            for w in work
        ]
        hidden = self._model.forward(chunks)  # [tokens, hidden]
        rows: list[Row] = []
        places: list[int] = []
        offset = 0
        for w in work:
            self._scheduler.computed(w)
            for index, row in w.sequence.rows_after(w.start, w.stop):
                rows.append(row)
                places.append(offset + index - w.start)
            offset += w.stop - w.start
            if w.sequence.branch is None and w.stop == w.sequence.goal:
                w.sequence.last_hidden = hidden[offset - 1 : offset].clone()
        return rows, [hidden if len(places) == offset else hidden[sent(places, hidden.device)]]

    def _start_branches(self) -> tuple[list[Row], list[Tensor]]:
        """Starts branches where there is room; returns the rows that follow from their roots, states [1, hidden]."""
        started = self._scheduler.start_branches()
        copies = [branch.copied_block for branch in started if branch.copied_block is not None]
        if copies:
            self._model.copy_blocks(copies)
        rows: list[Row] = []
        hidden: list[Tensor] = []
        for branch in started:
            sequence, prefix = branch.sequence, branch.sequence.num_computed
            if sequence.completion is not None and sequence.completion.limit == 0:
                sequence.job.events += sequence.completion.end(FinishReason.MAX_TOKENS)
                self._scheduler.retire(sequence)
            elif branch.root is not None:
                following = [row for _, row in sequence.rows_after(prefix - 1, prefix)]
                rows += following
                hidden += [branch.root.last_hidden] * len(following)
        self._scheduler.retire_roots()
        return rows, hidden

    def _slices(self, rows: list[Row], hidden: list[Tensor]) -> Iterator[tuple[list[Row], Tensor]]:
        """Rows that are reduced together, and their states. Of a small step without operations of torch: just after a
        pass, when the caches hold nothing but weights, two of them take 70 us."""
        if len(hidden) == 1 and 0 < len(rows) <= self._slice_rows:
            yield rows, hidden[0]
        elif rows:
            wanted = torch.cat(hidden)
            for first in range(0, len(rows), self._slice_rows):
                part = slice(first, first + self._slice_rows)
                yield rows[part], wanted[part]

    def _deliver(
        self,
        rows: list[Row],
        logits: Tensor,
        scored: defaultdict[Sequence, list[PositionLogprobs]],
        beams: dict[Sequence, BeamRow],
    ) -> None:
        """Draws and reduces some rows, and hands each sequence what it wanted.

        Args:
            logits: [rows, vocab] float32.
        """
        drawn = drawn_of(rows, logits, self._noise)
        found = candidates_of(rows, logits)
        positions = positions_of(rows, logits, drawn)
        for index, (row, position) in enumerate(zip(rows, positions, strict=True)):
            job = row.sequence.job
            if job.ticket not in self._states:
                continue
            if position is None:
                self._fail(job, "MODEL_YIELDED_NAN", "the logits of a position hold NaN or +inf")
            elif index in drawn and drawn[index].set_size == 0:
                self._fail(job, "NOTHING_TO_DRAW", "every token is masked")
            elif index in drawn:
                self._accept(row.sequence, position, drawn[index])
            elif index in found:
                ids, logprobs, ranks = found[index]
                beams[row.sequence] = BeamRow(position=position, token_ids=ids, logprobs=logprobs, ranks=ranks)
            else:
                scored[row.sequence].append(position)

    def _extend_beams(self, rows: dict[Sequence, BeamRow]) -> None:
        """Takes a step of every search whose beams were computed."""
        for job in dict.fromkeys(beam.job for beam in rows):
            if job.ticket in self._states and job.search is not None:
                chosen, events = job.search.extend([rows[beam] for beam in job.branches], self._vocabulary)
                job.events += events
                if copies := self._scheduler.extend_beams(job, chosen):
                    self._model.copy_blocks(copies)

    def _accept(self, sequence: Sequence, position: PositionLogprobs, drawn: DrawnToken) -> None:
        assert sequence.completion is not None
        events = sequence.completion.accept(position, drawn.sampling_logprob, drawn.set_size, self._vocabulary)
        sequence.job.events += events
        if events and isinstance(events[-1], CompletionFinished):
            self._scheduler.retire(sequence)
        else:
            assert position.token_id is not None
            sequence.token_ids.append(position.token_id)
            sequence.goal += 1

    def _publish(self, scored: dict[Sequence, list[PositionLogprobs]]) -> None:
        """Puts down what this step gave every job, and lets go of the sequences and jobs that are done."""
        told: defaultdict[JobState, list[Event]] = defaultdict(list)
        for sequence, positions in scored.items():
            told[sequence.job].append(_scored_event(sequence, positions))
        for state in list(self._states.values()):
            for sequence in [s for s in state.branches if s.completion is None and s.num_pending == 0]:
                self._scheduler.retire(sequence)
            # What a step scored comes before what it drew, but after the job's start.
            events = sorted(told[state] + state.events, key=lambda event: not isinstance(event, JobStarted))
            state.events = []
            if state.done:
                events.append(JobFinished())
                del self._states[state.ticket]
            if events:
                self._untold[state.ticket] += events

    def _fail(self, state: JobState, reason: str, detail: str) -> None:
        """Ends a job that cannot go on; the others do not notice."""
        self._scheduler.remove(state)
        del self._states[state.ticket]
        self._untold[state.ticket] += [*state.events, JobFailed(reason=reason, detail=detail)]

    def _tell(self) -> None:
        """Hands over what was given. Just before a pass: the kernels' leaves the interpreter to the listeners."""
        untold, self._untold = self._untold, defaultdict(list)
        if untold:
            self._hand_over([(ticket.sink, events) for ticket, events in untold.items()])


def _scored_event(sequence: Sequence, positions: list[PositionLogprobs]) -> Event:
    """The positions of one step as the event that tells them; the one nobody chose a token for comes last."""
    if sequence.branch is None:
        return PromptScored(positions=positions)
    following = positions.pop() if positions[-1].token_id is None else None
    return ContinuationScored(index=sequence.branch, positions=positions, next_token=following)


def _ignore(events: object) -> None:
    """Listens to nothing."""
