"""The server that the client's tests talk to."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from scripted import ScriptedServer, scripted_server


@pytest.fixture
def server() -> Iterator[ScriptedServer]:
    """A scripted server on a free port."""
    with scripted_server() as running:
        yield running
