"""Folders made once: whole or not there, whatever dies and whoever else makes them.

Makers run in processes of their own and wait for a line on standard input, so that tests say what happens when.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from logprobs_server.models.cache import make_once
from logprobs_server.models.errors import ModelNotUsableError

MAKER = """
import sys
from pathlib import Path
from logprobs_server.models.cache import make_once
from logprobs_server.models.progress import console_progress

def make(folder):
    (folder / "half").write_text("half")
    print("making", flush=True)
    sys.stdin.readline()
    (folder / "other half").write_text("whole")

make_once(Path(sys.argv[1]), make, console_progress(sys.stdout))
print("done", flush=True)
"""

Maker = Callable[[Path], "subprocess.Popen[str]"]


@contextmanager
def no_progress(task: str, total_bytes: int | None) -> Iterator[Any]:
    yield lambda count: None


@pytest.fixture
def maker() -> Iterator[Maker]:
    """Starts processes that make a folder; none outlives the test."""
    processes: list[subprocess.Popen[str]] = []

    def start(folder: Path) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", MAKER, str(folder)]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        processes.append(process)
        return process

    yield start
    for process in processes:
        process.kill()
        process.communicate()


def line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def visible(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.suffix != ".lock")


def write_whole(folder: Path) -> None:
    (folder / "whole").write_text("whole")


def test_a_folder_is_made_once(tmp_path: Path) -> None:
    made: list[Path] = []
    for _ in range(2):
        make_once(tmp_path / "cache" / "model", made.append, no_progress)
    assert len(made) == 1


def test_a_failed_attempt_leaves_nothing(tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        write_whole(folder)
        raise ModelNotUsableError("bad")

    with pytest.raises(ModelNotUsableError, match="bad"):
        make_once(tmp_path / "model", fail, no_progress)
    assert visible(tmp_path) == []


def test_a_killed_process_leaves_nothing_that_passes_for_whole_and_the_next_one_clears_up(
    tmp_path: Path, maker: Maker
) -> None:
    folder = tmp_path / "model [1]"
    killed = maker(folder)
    assert line(killed) == "making"
    killed.kill()
    killed.wait()
    assert not folder.exists()
    assert len(visible(tmp_path)) == 1
    make_once(folder, write_whole, no_progress)
    assert visible(tmp_path) == ["model [1]"]
    assert visible(folder) == ["whole"]


def test_of_two_processes_at_once_one_makes_the_folder_and_both_have_it(tmp_path: Path, maker: Maker) -> None:
    folder = tmp_path / "model"
    first = maker(folder)
    assert line(first) == "making"
    second = maker(folder)
    assert line(second).startswith("waiting for another process")
    assert not folder.exists()
    first.communicate("go on\n")
    assert line(second) == "done"
    assert (first.wait(), second.wait()) == (0, 0)
    assert visible(folder) == ["half", "other half"]
    assert visible(tmp_path) == ["model"]


def test_a_process_that_waited_for_one_that_died_makes_the_folder_itself(tmp_path: Path, maker: Maker) -> None:
    folder = tmp_path / "model"
    first = maker(folder)
    assert line(first) == "making"
    second = maker(folder)
    assert line(second).startswith("waiting for another process")
    first.kill()
    assert line(second) == "making"
    second.communicate("go on\n")
    assert second.returncode == 0
    assert visible(tmp_path) == ["model"]


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ModelNotUsableError, match=r"file/models: the converted model cannot be written here"):
        make_once(tmp_path / "file" / "models" / "model", write_whole, no_progress)
