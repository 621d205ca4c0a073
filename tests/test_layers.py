"""Which way imports point: each layer works where what it must not know is missing.

It looks at imports alone: whether a layer also behaves is for its own tests.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CLIENT = ROOT / "client"
SERVER = ROOT / "server"

HIDE_AND_IMPORT = """
import importlib, sys
hidden, modules = (argument.split() for argument in sys.argv[1:])
sys.modules.update(dict.fromkeys(hidden))
for module in modules:
    importlib.import_module(module)
"""
"""None in sys.modules makes a module one that is not installed, for whoever asks."""

UPPER = "logprobs_server.app logprobs_server.servicer"
LAYERS = [
    pytest.param(CLIENT, "logprobs.client", "torch transformers logprobs_server rich", id="client"),
    pytest.param(CLIENT, "logprobs.v1", "torch transformers logprobs_server rich", id="stubs"),
    pytest.param(SERVER, "logprobs_server.servicer", "torch transformers logprobs_server.app", id="servicer"),
    pytest.param(SERVER, "logprobs_server.validation", f"torch transformers {UPPER}", id="validation"),
    pytest.param(
        SERVER,
        "logprobs_server.engine",
        f"grpc google.protobuf logprobs_server.validation {UPPER}",
        id="engine",
    ),
    pytest.param(
        SERVER,
        "logprobs_server.text",
        f"grpc google.protobuf torch transformers logprobs_server.engine logprobs_server.validation {UPPER}",
        id="text",
    ),
    pytest.param(SERVER, "logprobs_server.errors", f"grpc torch logprobs_server.validation {UPPER}", id="errors"),
]
"""Where a layer lives, the module or package it is, and what it must not need."""


def module_name(source: Path, folder: Path) -> str:
    parts = source.relative_to(folder).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def modules(folder: Path, layer: str) -> list[str]:
    """The module or package `layer` and all below it."""
    names = [module_name(source, folder) for source in sorted(folder.rglob("*.py"))]
    return [name for name in names if f"{name}.".startswith(f"{layer}.")]


def imported(source: Path) -> Iterator[str]:
    """Every module that the file names in an import, wherever in the file."""
    for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module


def users(folder: Path, *packages: str) -> set[str]:
    """Files under `folder` that import any of the packages."""
    return {
        source.relative_to(folder).as_posix()
        for source in folder.rglob("*.py")
        if any(name.partition(".")[0] in packages for name in imported(source))
    }


def import_without(hidden: str, names: list[str]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", HIDE_AND_IMPORT, hidden, " ".join(names)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(("folder", "layer", "hidden"), LAYERS)
def test_a_layer_imports_without_what_it_must_not_know(folder: Path, layer: str, hidden: str) -> None:
    names = modules(folder, layer)
    assert names, f"there is no {layer}"
    finished = import_without(hidden, names)
    assert finished.returncode == 0, finished.stderr


def test_a_hidden_module_cannot_be_imported() -> None:
    finished = import_without("google.protobuf", ["google.protobuf.message"])
    assert "ModuleNotFoundError" in finished.stderr


def test_transformers_appears_in_one_package() -> None:
    assert {Path(user).parent.as_posix() for user in users(SERVER, "transformers")} == {"logprobs_server/engine/model"}


def test_the_client_names_no_part_of_the_server() -> None:
    assert users(CLIENT, "torch", "transformers", "logprobs_server") == set()
