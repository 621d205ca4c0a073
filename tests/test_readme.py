"""What the README shows is true: its examples run as they stand, its outputs are what comes out, its table is whole."""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import pytest
from logprobs_server.config import Config
from logprobs_server.demo import local_server

README = (Path(__file__).parent.parent / "README.md").read_text()
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, re.DOTALL)


@pytest.fixture(scope="module")
def target(embedded_folder: Path) -> Iterator[str]:
    """The address of a server with the default model."""
    with local_server([]) as address:
        yield address


def run(command: list[str], target: str) -> str:
    """Output of a command that finds our programs on its path and the server where the README has it."""
    programs = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {
        **os.environ,
        "PATH": programs,
        "LOGPROBS_TARGET": target,
        "COLUMNS": "100",
        "GRPC_VERBOSITY": "ERROR",
    }
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def alike(printed: str, shown: str) -> bool:
    """Whether two words are the same, or numbers that differ as those of two machines do."""
    try:
        return math.isclose(float(printed), float(shown), rel_tol=1e-4, abs_tol=1e-3)
    except ValueError:
        return printed == shown


@pytest.mark.parametrize("code", [text for kind, text in BLOCKS if kind == "python"])
def test_python_examples_run(code: str, target: str) -> None:
    assert run([sys.executable, "-c", code.replace("127.0.0.1:50051", target)], target)


@pytest.mark.parametrize("commands", [text for kind, text in BLOCKS if kind == "sh"])
def test_shell_examples_run(commands: str, target: str) -> None:
    assert run(["bash", "-euc", commands.replace("127.0.0.1:50051", target)], target)


@pytest.mark.parametrize("session", [text for kind, text in BLOCKS if kind == "console"])
def test_shown_output_is_what_comes_out(session: str, target: str) -> None:
    command, _, shown = session.removeprefix("$ ").partition("\n")
    printed = run(["bash", "-euc", command], target)
    assert len(printed.split()) == len(shown.split())
    assert all(map(alike, printed.split(), shown.split())), printed


def test_table_of_options_is_that_of_the_server() -> None:
    rows = [
        f"| `--{setting.name.replace('_', '-')}` | {'' if setting.default is None else f'`{setting.default}`'}"
        f" | {setting.metadata['about']} |"
        for setting in fields(Config)
        if setting.metadata
    ]
    assert [line for line in README.splitlines() if line.startswith("| `--")] == rows
