"""Which colour a probability has, for all that is shown."""

from __future__ import annotations

import math

__all__ = ["style_of"]

_STYLES = ((0.5, "green"), (0.1, "yellow"), (0.01, "dark_orange"), (0.0, "red"))


def style_of(logprob: float | None) -> str:
    """A rich style: green from one half, red below one in a hundred, dim for what has no logprob."""
    if logprob is None:
        return "dim"
    probability = math.exp(logprob)
    return next(style for least, style in _STYLES if probability >= least)
