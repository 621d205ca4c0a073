"""Finds the first stop string in text that comes in pieces. Knows nothing of bytes or tokens.

The match that ends first wins, then the longest. Each stop string has a Knuth-Morris-Pratt automaton
(doi:10.1137/0206024), whose state is the length of the longest start of the string that the text ends with; so the
greatest state tells how much of the text may still become part of a match.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

__all__ = ["StopMatcher"]


class StopMatcher:
    """Lets text through up to the first match of a stop string; what may still become part of one waits.

    matched: the stop string that was found, None so far.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        assert all(stops), "the empty string would match anywhere"
        self.matched: str | None = None
        self._stops = sorted(stops, key=len, reverse=True)  # of those that end together the longest comes first
        self._borders = [_borders(stop) for stop in self._stops]
        self._first_characters = frozenset(stop[0] for stop in self._stops)
        self._states = [0] * len(self._stops)
        self._held = ""

    def fork(self) -> StopMatcher:
        """One that goes on from the same text by itself."""
        other = copy.copy(self)
        other._states = self._states.copy()
        return other

    def push(self, text: str) -> str:
        """Takes the next text; returns what is certain. After a match that is nothing."""
        if self.matched is not None:
            return ""
        if not self._held and self._first_characters.isdisjoint(text):
            return text
        whole = self._held + text
        for end, character in enumerate(text, len(self._held) + 1):
            stop = self._step(character)
            if stop is not None:
                self.matched = stop
                self._held = ""
                return whole[: end - len(stop)]
        certain = len(whole) - max(self._states)
        self._held = whole[certain:]
        return whole[:certain]

    def flush(self) -> str:
        """Returns the text that waits. Matching starts afresh: no match reaches back over a flush."""
        held, self._held = self._held, ""
        self._states = [0] * len(self._stops)
        return held

    def _step(self, character: str) -> str | None:
        """Moves every automaton on by one character; returns the longest stop string that ends with it."""
        states = self._states
        for index, stop in enumerate(self._stops):
            state = states[index]
            while state and stop[state] != character:
                state = self._borders[index][state]
            if stop[state] == character:
                state += 1
                if state == len(stop):
                    return stop
            states[index] = state
        return None


def _borders(stop: str) -> list[int]:
    """For each length: the longest shorter start of `stop` that its start of that length ends with."""
    borders = [0, 0]
    for character in stop[1:]:
        border = borders[-1]
        while border and stop[border] != character:
            border = borders[border]
        borders.append(border + (stop[border] == character))
    return borders
