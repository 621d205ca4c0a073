"""Cuts sequences into the jobs that score them, windows of those that are longer than the model's context among them.

Rolling windows as for perplexity of long texts: every window is filled, each token is scored once, by the first window
that holds it and with the whole window before it as its context.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from logprobs_server.engine.types import Continuation, LogprobOptions, ScoreJob
from logprobs_server.requests import Scoring

__all__ = ["Windows", "common_prefix", "scoring_of"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Windows:
    """How long sequences are rolled: the length of a window, and the new tokens each scores."""

    length: int
    stride: int

    def count(self, length: int, first: int) -> int:
        """Number of windows of a sequence of that length whose tokens are scored from `first` on."""
        return 1 - (self._first_stop(length, first) - length) // self.stride

    def of(self, length: int, first: int) -> Iterator[tuple[int, int, int]]:
        """Start, stop, and first token to score of each window, as places in the whole sequence."""
        stop = self._first_stop(length, first)
        while True:
            yield max(0, stop - self.length), stop, first
            if stop == length:
                return
            first, stop = stop, min(stop + self.stride, length)

    def _first_stop(self, length: int, first: int) -> int:
        return min(max(self.length, first + self.stride), length)


def scoring_of(
    wholes: Sequence[tuple[int, ...]],
    firsts: Sequence[int],
    windows: Windows,
    options: LogprobOptions,
    next_options: LogprobOptions | None,
) -> Scoring:
    """The jobs that score sequences: one for all that fit the model's context, one for the windows of the others.

    Args:
        firsts: per sequence, the first token to score.
        options: what to tell of the tokens. next_options: of the token after each sequence, None for nothing.
    """
    fitting = [i for i, whole in enumerate(wholes) if len(whole) <= windows.length]
    prefix = common_prefix([wholes[i][: firsts[i]] for i in fitting])
    together = [Continuation(token_ids=wholes[i][len(prefix) :], scored_from=firsts[i] - len(prefix)) for i in fitting]
    places = {i: [(0, branch)] for branch, i in enumerate(fitting)}
    rolled: list[Continuation] = []
    for i, whole in enumerate(wholes):
        if i not in places:
            places[i] = []
            for start, stop, first in windows.of(len(whole), firsts[i]):
                places[i].append((1 if fitting else 0, len(rolled)))
                rolled.append(Continuation(token_ids=whole[start:stop], scored_from=first - start))
    jobs = [
        ScoreJob(prefix=shared, continuations=tuple(parts), logprobs=options, next_logprobs=next_options)
        for shared, parts in ((prefix, together), ((), rolled))
        if parts
    ]
    return Scoring(jobs=tuple(jobs), places=tuple(tuple(places[i]) for i in range(len(wholes))))


def common_prefix(sequences: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    """What all sequences start with; nothing of no sequences."""
    if not sequences:
        return ()
    shortest, longest = min(sequences), max(sequences)
    length = next((i for i, (a, b) in enumerate(zip(shortest, longest, strict=False)) if a != b), len(shortest))
    return shortest[:length]
