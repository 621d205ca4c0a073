"""A model that needs no torch module: its logits are a chosen function of all tokens so far, its tokens are bytes.

It finds the tokens before a chunk only where its KV cache says they are, so a wrong block gives wrong logits.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

import torch
from logprobs_server.engine.batch import Chunk
from logprobs_server.engine.engine import TorchEngine, tell_each
from logprobs_server.engine.events import (
    CompletionDecoded,
    ContinuationScored,
    DecodedToken,
    Event,
    JobFailed,
    JobFinished,
    PositionLogprobs,
)
from logprobs_server.engine.kv_cache import BLOCK_SIZE
from logprobs_server.engine.types import (
    GenerateJob,
    Job,
    LogprobOptions,
    ModelDescription,
    SamplingOptions,
    StoppingOptions,
    Ticket,
    Told,
)
from torch import Tensor

__all__ = [
    "EOS",
    "VOCABULARY_SIZE",
    "ByteVocabulary",
    "FakeModel",
    "Listener",
    "generate_job",
    "random_logits",
    "running_engine",
]

EOS = 256
VOCABULARY_SIZE = 257

Logits = Callable[[tuple[int, ...]], Tensor]


def random_logits(history: tuple[int, ...]) -> Tensor:
    """Logits that look random and depend on every token so far, [vocab]."""
    seed = hash(history) & 0xFFFFFFFF  # of integers: the same in every process
    return 2 * torch.randn(VOCABULARY_SIZE, generator=torch.Generator().manual_seed(seed))


class FakeModel:
    """Implements `Model`. Its hidden states are numbers of histories.

    before_forward: called on the engine's thread with the number of passes before.
    """

    def __init__(self, logits: Logits = random_logits, *, num_blocks: int = 64, context_length: int = 256) -> None:
        self.description = ModelDescription(
            name="fake",
            revision="",
            dtype="float32",
            batch_invariant=True,
            vocabulary_size=VOCABULARY_SIZE,
            context_length=context_length,
            eos_token_ids=(EOS,),
            bos_token_id=None,
        )
        self.device = torch.device("cpu")
        self.num_blocks = num_blocks
        self.own_threads = False
        self.prompt_pace: int | None = 1
        self.num_forwards = 0
        self.before_forward: Callable[[int], None] = lambda num_forwards: None
        self._logits = logits
        self._stored: list[int | None] = [None] * (num_blocks * BLOCK_SIZE)
        self._histories: list[tuple[int, ...]] = []

    def forward(self, chunks: Sequence[Chunk]) -> Tensor:
        """Stores the chunks' tokens; returns the number of each token's history, [tokens, 1]."""
        self.num_forwards += 1
        self.before_forward(self.num_forwards - 1)
        first = len(self._histories)
        for chunk in chunks:
            slots = [block * BLOCK_SIZE + i for block in chunk.blocks for i in range(BLOCK_SIZE)]
            for slot, token_id in zip(slots[chunk.start :], chunk.token_ids, strict=False):
                self._stored[slot] = token_id
            history = tuple(self._read(slot) for slot in slots[: chunk.start + len(chunk.token_ids)])
            self._histories += [history[: end + 1] for end in range(chunk.start, len(history))]
        return torch.arange(first, len(self._histories), dtype=torch.float64).unsqueeze(-1)

    def logits(self, hidden: Tensor) -> Tensor:
        """The chosen logits after each history, [rows, vocab]."""
        return torch.stack([self._logits(self._histories[int(number)]) for number in hidden.flatten().tolist()])

    def copy_blocks(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copies the tokens in blocks, (from, to)."""
        for source, target in pairs:
            for i in range(BLOCK_SIZE):
                self._stored[target * BLOCK_SIZE + i] = self._stored[source * BLOCK_SIZE + i]

    def _read(self, slot: int) -> int:
        token_id = self._stored[slot]
        assert token_id is not None, f"slot {slot} was never written"
        return token_id


class ByteVocabulary:
    """Implements `TokenBytes`: one token per byte, and EOS."""

    def token_bytes(self, token_id: int) -> bytes:
        """The byte."""
        return bytes([token_id]) if token_id < EOS else b""

    def spelled(self, token_id: int) -> bytes:
        """The byte, or how EOS is spelled."""
        return self.token_bytes(token_id) or b"<eos>"


class Listener:
    """One job under way: the events it was told, in order."""

    def __init__(self, engine: TorchEngine, job: Job) -> None:
        self.events: list[Event] = []
        self._ended = threading.Event()
        self.ticket: Ticket = engine.submit(job, self._hear)

    def _hear(self, events: Sequence[Event]) -> None:
        self.events += events
        if isinstance(events[-1], (JobFinished, JobFailed)):
            self._ended.set()

    def wait(self) -> list[Event]:
        """All events, once the job has ended."""
        assert self._ended.wait(60), "the job never ended"
        return self.events

    def tokens(self, index: int = 0) -> list[DecodedToken]:
        """The tokens of one completion, once the job has ended."""
        decoded = [event for event in self.wait() if isinstance(event, CompletionDecoded) and event.index == index]
        return [token for event in decoded for token in event.tokens]

    def token_ids(self, index: int = 0) -> list[int]:
        """The token ids of one completion."""
        return [token.position.token_id for token in self.tokens(index) if token.position.token_id is not None]

    def scored(self, index: int = 0) -> list[PositionLogprobs]:
        """The positions of one continuation, once the job has ended."""
        told = [event for event in self.wait() if isinstance(event, ContinuationScored) and event.index == index]
        return [position for event in told for position in event.positions]

    def failure(self) -> str | None:
        """Why the job failed, if it did."""
        last = self.wait()[-1]
        return last.reason if isinstance(last, JobFailed) else None


@contextmanager
def running_engine(
    model: FakeModel,
    *,
    max_sequences: int = 8,
    max_step_tokens: int = 32,
    max_queue: int = 100,
    hand_over: Callable[[Told], None] = tell_each,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[TorchEngine]:
    """An engine that runs; afterwards every block must be free."""
    engine = TorchEngine(
        model,
        ByteVocabulary(),
        max_sequences=max_sequences,
        max_step_tokens=max_step_tokens,
        max_queue=max_queue,
        hand_over=hand_over,
        clock=clock,
    )
    engine.start()
    try:
        yield engine
    finally:
        engine.close()
    assert engine.num_free_blocks == engine.num_blocks


def generate_job(prompt: Sequence[int], *, max_tokens: int = 20, count: int = 1, **given: Any) -> GenerateJob:
    """Samples at temperature 1 with seed 1 and no stop unless told otherwise."""
    neutral = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "seed": 1}
    sampling = {field.name: given.pop(field.name) for field in fields(SamplingOptions) if field.name in given}
    return GenerateJob(
        prompt=tuple(prompt),
        max_tokens=max_tokens,
        completion_count=count,
        sampling=SamplingOptions(**(neutral | sampling)),
        stopping=given.pop("stopping", StoppingOptions(ignore_eos=True)),
        logprobs=LogprobOptions(top_count=2),
        **given,
    )


def nan_after(token_id: int) -> Logits:
    """Random logits, but NaN after this token."""

    def logits(history: tuple[int, ...]) -> Tensor:
        found = random_logits(history)
        return torch.full_like(found, math.nan) if history[-1] == token_id else found

    return logits
