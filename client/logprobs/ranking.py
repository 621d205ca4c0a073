"""Compares completions by their totals: means, perplexity, bits per byte, and an order, best first.

Pure. Knows totals and indices, not where they came from: a stream, a ranking, a file.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Literal, Protocol, TypeVar

from logprobs.v1 import logprobs_pb2 as pb

__all__ = ["Criterion", "Rankable", "bits_per_byte", "mean_logprob", "perplexity", "rank"]

Criterion = Literal["mean", "total", "length_normalized"]


class Rankable(Protocol):
    """What has an index and totals: a Completion, for one."""

    @property
    def index(self) -> int:
        """Which draw, from 0."""

    @property
    def totals(self) -> pb.Totals:
        """Over every token drawn."""


_Ranked = TypeVar("_Ranked", bound=Rankable)


def mean_logprob(totals: pb.Totals) -> float | None:
    """Logprob per token, in nats; None for no tokens."""
    return totals.logprob / totals.token_count if totals.token_count else None


def perplexity(totals: pb.Totals) -> float | None:
    """Exponential of minus the mean logprob, 1 or more; None for no tokens, infinite beyond what a float holds."""
    mean = mean_logprob(totals)
    if mean is None:
        return None
    try:
        return math.exp(-mean)
    except OverflowError:
        return math.inf


def bits_per_byte(totals: pb.Totals) -> float | None:
    """Minus the total in bits, per byte of text; None for no bytes. Compares models of different vocabularies."""
    return -totals.logprob / math.log(2) / totals.byte_count if totals.byte_count else None


def rank(
    completions: Iterable[_Ranked], criterion: Criterion = "mean", *, length_exponent: float = 1.0
) -> tuple[_Ranked, ...]:
    """The completions, best first; equal ones by index.

    Args:
        criterion: "mean" is the logprob per token (sample and rank, arXiv:2001.09977), "total" their sum,
            "length_normalized" the sum divided by the token count to the power of `length_exponent`.

    A completion without tokens says nothing; it goes last, whatever the criterion.
    Raises:
        ValueError: there is no such criterion.
    """
    if criterion not in ("mean", "total", "length_normalized"):
        raise ValueError(f"criterion: {criterion!r} is none of 'mean', 'total', 'length_normalized'")
    exponent = {"mean": 1.0, "total": 0.0}.get(criterion, length_exponent)
    return tuple(sorted(completions, key=lambda c: (-_value(c.totals, exponent), c.index)))


def _value(totals: pb.Totals, exponent: float) -> float:
    if not totals.token_count:
        return -math.inf
    return totals.logprob / float(totals.token_count**exponent)
