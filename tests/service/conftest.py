"""Servers that several tests of the service share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from harness import Served, running
from tiny_models import save_tiny_model


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random model."""
    folder = tmp_path_factory.mktemp("service") / "tiny"
    save_tiny_model("llama", folder)
    return folder


@pytest.fixture(scope="session")
def tiny(tiny_folder: Path) -> Iterator[Served]:
    """The tiny model with the server's own limits."""
    with running(tiny_folder, max_sequences=32) as served:
        yield served


@pytest.fixture(scope="session")
def embedded(embedded_folder: Path) -> Iterator[Served]:
    """The embedded default model."""
    with running(embedded_folder, threads=2, kv_cache_mib=256, context_length=1024) as served:
        yield served
