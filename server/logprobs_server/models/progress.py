"""Progress of long work, for people: a bar on a terminal, plain lines elsewhere. Knows nothing of what the work is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol, TextIO

import rich.progress
from rich.console import Console

__all__ = ["Advance", "Progress", "console_progress"]

_LINES = 4
"""Plain lines about a task's progress, the last at its end."""

Advance = Callable[[int], None]
"""Called with the number of bytes done since the last call."""


class Progress(Protocol):
    """Shows one task at a time."""

    def __call__(self, task: str, total_bytes: int | None) -> AbstractContextManager[Advance]:
        """Shows the task until the context ends; None where nobody knows how much there is to do."""


def console_progress(stream: TextIO) -> Progress:
    """Progress written to the stream."""

    @contextmanager
    def show(task: str, total_bytes: int | None) -> Iterator[Advance]:
        with _bar(stream, task, total_bytes) if stream.isatty() else _lines(stream, task, total_bytes) as advance:
            yield advance

    return show


@contextmanager
def _bar(stream: TextIO, task: str, total_bytes: int | None) -> Iterator[Advance]:
    columns: list[rich.progress.ProgressColumn] = [rich.progress.TextColumn("{task.description}", markup=False)]
    if total_bytes is None:
        columns += [rich.progress.SpinnerColumn(), rich.progress.TimeElapsedColumn()]
    else:
        columns += [rich.progress.BarColumn(), rich.progress.DownloadColumn(), rich.progress.TimeRemainingColumn()]
    with rich.progress.Progress(*columns, console=Console(file=stream)) as bars:
        bar = bars.add_task(task, total=total_bytes)
        yield lambda count: bars.advance(bar, count)


@contextmanager
def _lines(stream: TextIO, task: str, total_bytes: int | None) -> Iterator[Advance]:
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        before, done = done, done + count
        if total_bytes and done * _LINES // total_bytes > before * _LINES // total_bytes:
            print(f"{task}: {done * 100 // total_bytes} %", file=stream, flush=True)

    print(f"{task} …", file=stream, flush=True)
    yield advance
