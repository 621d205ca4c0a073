"""How far log probabilities lie from the truth, and whether that is near enough; no I/O."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean

__all__ = ["BF16_MEAN", "FLOAT32_RATIO", "Deviation", "deviation", "near_enough"]

BF16_MEAN = 0.010
"""Nats that bfloat16 may be off by in the mean."""
FLOAT32_RATIO = 0.75
"""What share of transformers' own deviations float32 may have, in the mean and at most."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Deviation:
    """Mean and largest absolute difference in nats, over so many tokens."""

    tokens: int
    mean: float
    max: float

    def over(self, other: Deviation) -> tuple[float, float]:
        """Ratios of the means and of the largest."""
        return self.mean / other.mean, self.max / other.max


def deviation(differences: Sequence[float]) -> Deviation:
    """Of all differences; NaN counts as infinitely far."""
    sizes = [abs(each) if each == each else float("inf") for each in differences]
    return Deviation(tokens=len(sizes), mean=mean(sizes), max=max(sizes))


def near_enough(dtype: str, ours: Deviation, transformers: Deviation | None) -> bool | None:
    """Whether ours reach what is wanted of their type; None if nobody is there to compare with."""
    if dtype == "bfloat16":
        return ours.mean <= BF16_MEAN
    return None if transformers is None else all(ratio <= FLOAT32_RATIO for ratio in ours.over(transformers))
