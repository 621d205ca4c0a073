"""Progress: a bar for people at a terminal, few and plain lines for everything else."""

from __future__ import annotations

import io

import pytest
from logprobs_server.models.progress import console_progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_elsewhere_progress_is_a_line_at_the_start_and_at_each_quarter() -> None:
    stream = io.StringIO()
    with console_progress(stream)("converting", 1000) as advance:
        for _ in range(100):
            advance(10)
    quarters = [f"converting: {quarter} %" for quarter in (25, 50, 75, 100)]
    assert stream.getvalue().splitlines() == ["converting …", *quarters]


@pytest.mark.parametrize("total", [None, 0])
def test_a_task_of_unknown_or_no_size_is_one_line(total: int | None) -> None:
    stream = io.StringIO()
    with console_progress(stream)("reading", total) as advance:
        advance(10)
    assert stream.getvalue() == "reading …\n"


@pytest.mark.parametrize("total", [None, 2_000_000])
def test_a_terminal_shows_task_and_bar(total: int | None) -> None:
    stream = Terminal()
    with console_progress(stream)("converting [model]", total) as advance:
        advance(1_000_000)
    assert "converting [model]" in stream.getvalue()
    assert ("1.0/2.0 MB" in stream.getvalue()) is (total is not None)
