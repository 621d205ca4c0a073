"""Shows completions in a terminal while they grow. Takes a stream's events; knows nothing of where they come from.

It draws when an event comes, at most so often, so nothing runs beside the stream.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from types import TracebackType
from typing import Self

from rich.cells import cell_len
from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from logprobs.style import style_of
from logprobs.v1 import logprobs_pb2 as pb
from logprobs.visible import one_line, readable

__all__ = ["LiveCompletions"]

_SECONDS_BETWEEN_DRAWINGS = 0.08


class LiveCompletions:
    """Running text for one completion; for several a row each, which shows its latest part once it is full."""

    def __init__(self, console: Console, clock: Callable[[], float] = time.monotonic) -> None:
        self._console = console
        self._clock = clock
        self._live = Live(console=console, auto_refresh=False)
        self._rows: dict[int, list[tuple[str, str]]] = {}
        self._ended: set[int] = set()
        self._several = False
        self._drawn = 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._several:
            self._draw()
            self._live.stop()
        elif self._rows:
            self._console.print()

    def push(self, event: pb.GenerateResponse) -> None:
        """Takes the next event."""
        if event.HasField("started") and event.started.completion_count > 1:
            self._several = True
            self._live.start()
        for delta in event.decoded.deltas:
            self._grow(delta)
        if event.HasField("finished"):
            self._ended.add(event.finished.completion)
        if self._several and self._clock() - self._drawn >= _SECONDS_BETWEEN_DRAWINGS:
            self._draw()

    def _grow(self, delta: pb.CompletionDelta) -> None:
        """A delta has one colour, that of its least probable token: its text may lag behind its tokens."""
        style = style_of(min((token.logprob for token in delta.tokens), default=None))
        self._rows.setdefault(delta.completion, []).append((delta.text, style))
        if not self._several:
            self._console.print(Text(readable(delta.text), style=style), end="", soft_wrap=True)

    def _draw(self) -> None:
        rows = (self._row(index, pieces) for index, pieces in sorted(self._rows.items()))
        self._live.update(Group(*rows), refresh=True)
        self._drawn = self._clock()

    def _row(self, index: int, pieces: list[tuple[str, str]]) -> Text:
        head = f"{index:>3} {'✓' if index in self._ended else '…'} "
        tail = _tail(pieces, self._console.width - cell_len(head))
        return Text.assemble((head, "dim"), *tail, no_wrap=True, overflow="crop")


def _tail(pieces: list[tuple[str, str]], width: int) -> list[tuple[str, str]]:
    """The pieces in one line; of more than fit, the end of it."""
    kept: list[tuple[str, str]] = []
    room = max(width - 1, 0)
    for text, style in reversed(pieces):
        line = one_line(text)
        end = _end(line, room)
        kept.append((end, style))
        room -= cell_len(end)
        if len(end) < len(line):
            kept.append(("…", "dim"))
            break
    return kept[::-1]


def _end(line: str, cells: int) -> str:
    """As much of the line's end as the cells hold; a character may need two."""
    end = line[len(line) - min(cells, len(line)) :]
    while cell_len(end) > cells:
        end = end[1:]
    return end
