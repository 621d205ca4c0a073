"""What is done to the logits of single tokens before temperature: bias, then the penalties.

In transformers' order where it has them: bias, repetition penalty (arXiv:1909.05858), which counts prompt and
completion; then presence and frequency penalty (OpenAI's definition), which count the completion alone. Only tokens
that are biased or occurred are touched, all rows at once, in float64, rounded once.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from logprobs_server.engine.transfer import sent
from logprobs_server.engine.types import SamplingOptions

__all__ = ["Adjustment", "JobAdjustment", "adjust"]


@dataclass(frozen=True, slots=True)
class _Touched:
    """Some tokens, each once, and what is done to their logits.

    ids: [tokens] int64.
    numbers: [3, tokens] float64: what is added, what the sum is divided by (or multiplied, if it is negative), what is
        taken off in the end.
    """

    ids: Tensor
    numbers: Tensor


class JobAdjustment:
    """What all completions of a job share: biases, and the prompt's tokens under a repetition penalty."""

    def __init__(self, options: SamplingOptions, prompt: Iterable[int]) -> None:
        self.options = options
        self.biases = dict(options.logit_bias)
        repeated = frozenset(prompt if options.repetition_penalty != 1 else ())
        ids = sorted(repeated | self.biases.keys())
        added = [self.biases.get(token_id, 0.0) for token_id in ids]
        divisors = [options.repetition_penalty if token_id in repeated else 1.0 for token_id in ids]
        numbers = torch.tensor([added, divisors, [0.0] * len(ids)], dtype=torch.float64)
        self.touched = _Touched(torch.tensor(ids, dtype=torch.int64), numbers)


class Adjustment:
    """What one completion does to logits. Grows with the tokens drawn, at the same cost for each."""

    def __init__(self, shared: JobAdjustment) -> None:
        self._shared = shared
        self._slots: dict[int, int] = {}
        self._ids = array("q")
        self._added, self._divisors, self._taken = array("d"), array("d"), array("d")

    def count(self, token_id: int) -> None:
        """Notes that the completion holds the token once more."""
        options = self._shared.options
        if not options.penalizes:
            return
        slot = self._slots.setdefault(token_id, len(self._ids))
        if slot == len(self._ids):
            self._ids.append(token_id)
            self._added.append(self._shared.biases.get(token_id, 0.0))
            self._divisors.append(options.repetition_penalty)
            self._taken.append(options.presence_penalty)
        self._taken[slot] += options.frequency_penalty

    def touched(self) -> list[_Touched]:
        """What it touches now: tokens of the job first, then its own, which replace those."""
        if not self._ids:
            return [self._shared.touched]
        numbers = [
            torch.frombuffer(column, dtype=torch.float64) for column in (self._added, self._divisors, self._taken)
        ]
        return [self._shared.touched, _Touched(torch.frombuffer(self._ids, dtype=torch.int64), torch.stack(numbers))]


def adjust(logits: Tensor, adjustments: Sequence[Adjustment | None]) -> None:
    """Adjusts each row's logits in place.

    Args:
        logits: [rows, vocab] float32, contiguous. What passes float32's range is held at its ends; -inf stays.
    """
    vocab, flat = logits.shape[-1], logits.view(-1)
    layers: list[list[tuple[Tensor, Tensor]]] = [[], []]
    for row, adjustment in enumerate(adjustments):
        for layer, touched in zip(layers, adjustment.touched() if adjustment else (), strict=False):
            layer.append((touched.ids + row * vocab, touched.numbers))
    joined = [
        (torch.cat([places for places, _ in layer]), torch.cat([numbers for _, numbers in layer], dim=1))
        for layer in layers
        if layer
    ]
    moved = [(sent(places, logits.device), sent(numbers, logits.device)) for places, numbers in joined]
    adjusted = [(places, _adjusted(flat[places], numbers)) for places, numbers in moved]  # all of the given logits
    for places, values in adjusted:
        flat[places] = values


def _adjusted(logits: Tensor, numbers: Tensor) -> Tensor:
    """Logits [tokens] float32 after what `_Touched` says is done to them."""
    added, divisors, taken = numbers
    values = logits.double() + added
    values = torch.where(values < 0, values * divisors, values / divisors) - taken
    limit = torch.finfo(torch.float32).max
    return torch.where(values == -torch.inf, values, values.clamp(-limit, limit)).float()
