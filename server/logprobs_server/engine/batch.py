"""What the engine needs of a model: chunks of sequences in, hidden states and logits out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from logprobs_server.engine.types import ModelDescription

__all__ = ["Chunk", "Model"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """Consecutive tokens of one sequence, to be computed: the first stands at position `start`.

    blocks: where the sequence's keys and values are; those of the tokens before `start` are there already.
    """

    token_ids: Sequence[int]
    start: int
    blocks: Sequence[int]


class Model(Protocol):
    """What the engine needs of a model.

    own_threads: whether it has threads of its own, which those of torch must not get in the way of.
    prompt_pace: how many tokens of a prompt it computes in the time of one decoded token, as `SchedulerLimits` counts;
        None: so many that nobody waits for them, on a GPU.
    """

    description: ModelDescription
    device: torch.device
    num_blocks: int
    own_threads: bool
    prompt_pace: int | None

    def forward(self, chunks: Sequence[Chunk]) -> Tensor:
        """Computes the chunks and stores their keys and values; returns hidden states [tokens of all, hidden]."""

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [rows, vocab] that follow hidden states [rows, hidden]."""

    def copy_blocks(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copies keys and values of blocks, (from, to)."""
