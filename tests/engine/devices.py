"""Tiny models on the device path, and sequences that they compute piece by piece, in company or alone."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import torch
from fakes import ByteVocabulary, Listener, generate_job
from logprobs_server.engine.batch import Chunk
from logprobs_server.engine.decoder import architecture_of
from logprobs_server.engine.device import DeviceModel
from logprobs_server.engine.engine import TorchEngine
from logprobs_server.engine.kv_cache import blocks_for
from logprobs_server.engine.types import ModelDescription
from tiny_models import ARCHITECTURES, CONTEXT_LENGTH, EOS_ID, RELATIVES, VOCABULARY_SIZE
from torch import Tensor

__all__ = [
    "CPU",
    "CUDA",
    "FAMILIES",
    "NUM_BLOCKS",
    "TILE",
    "TOLERANCE",
    "Sequences",
    "check_company",
    "deviation",
    "device_model",
    "drawn_ids",
]

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
FAMILIES = [name for name in (*ARCHITECTURES, *RELATIVES) if name != "opt"]
TOLERANCE = 1e-4
"""Most that a logprob may differ, in nats."""
TILE = 4
NUM_BLOCKS = 80


class Sequences:
    """Sequences of random tokens and their scattered blocks, computed piece by piece."""

    def __init__(self, *lengths: int) -> None:
        numbers = random.Random(0)
        blocks = numbers.sample(range(1, NUM_BLOCKS), NUM_BLOCKS - 1)
        self.ids = [[numbers.randrange(VOCABULARY_SIZE) for _ in range(length)] for length in lengths]
        self.blocks = [[blocks.pop() for _ in range(blocks_for(length) + 1)] for length in lengths]
        self.computed = [0] * len(lengths)
        self._logits: list[list[Tensor]] = [[] for _ in lengths]

    def step(self, model: DeviceModel, counts: dict[int, int]) -> None:
        """Computes so many more tokens of each of these sequences."""
        chunks = []
        for index, count in counts.items():
            start = self.computed[index]
            token_ids = self.ids[index][start : start + count]
            chunks.append(Chunk(token_ids=token_ids, start=start, blocks=self.blocks[index]))
            self.computed[index] += count
        logits = model.logits(model.forward(chunks))
        for index, part in zip(counts, torch.split(logits, list(counts.values())), strict=True):
            self._logits[index].append(part)

    def finish(self, model: DeviceModel, index: int, size: int) -> Tensor:
        """Computes the rest of a sequence in pieces of this size."""
        while left := len(self.ids[index]) - self.computed[index]:
            self.step(model, {index: min(size, left)})
        return self.logits(index)

    def logits(self, index: int) -> Tensor:
        """All logits of a sequence so far, [tokens, vocab]."""
        return torch.cat(self._logits[index])


def device_model(
    model: Any, device: torch.device = CPU, tile: int = TILE, context_length: int = CONTEXT_LENGTH
) -> DeviceModel:
    """The model on the device path."""
    description = ModelDescription(
        name="tiny",
        revision="",
        dtype=str(model.dtype).removeprefix("torch."),
        batch_invariant=False,
        vocabulary_size=VOCABULARY_SIZE,
        context_length=context_length,
        eos_token_ids=(EOS_ID,),
        bos_token_id=None,
    )
    architecture = architecture_of(model.to(device), context_length)
    assert architecture is not None
    return DeviceModel(architecture, description, dtype=model.dtype, num_blocks=NUM_BLOCKS, device=device, tile=tile)


def deviation(logits: Tensor, model: Any, token_ids: Sequence[int]) -> float:
    """The largest difference, in nats, from transformers' own pass."""
    exact = model(input_ids=torch.tensor([token_ids], device=model.device), use_cache=False).logits[0]
    return float((logits.double().log_softmax(-1) - exact.double().log_softmax(-1)).abs().max())


def check_company(model: Any, served: DeviceModel) -> None:
    """Three sequences, long ones in chunks beside others that decode: all as transformers has them."""
    sequences = Sequences(300, 41, 66)
    for counts in ({0: 70, 1: 5}, {1: 1, 0: 64, 2: 33}, {1: 1, 2: 1}, {1: 1, 2: 31, 0: 121}):
        sequences.step(served, counts)
    for _ in range(33):
        sequences.step(served, {0: 1, 1: 1})
    for index in range(3):
        logits = sequences.finish(served, index, 7)
        assert deviation(logits, model, sequences.ids[index]) <= TOLERANCE, index


def drawn_ids(served: DeviceModel) -> list[list[int]]:
    """Token ids that an engine draws for four prompts side by side."""
    engine = TorchEngine(served, ByteVocabulary(), max_sequences=4, max_step_tokens=32, max_queue=10)
    engine.start()
    try:
        jobs = [generate_job(list(range(3 + 20 * i)), max_tokens=12, temperature=t) for i, t in enumerate((0, 1, 0, 2))]
        return [listener.token_ids() for listener in [Listener(engine, job) for job in jobs]]
    finally:
        engine.close()
