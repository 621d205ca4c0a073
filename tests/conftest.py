"""What tests of several parts share."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import pytest
from hypothesis import settings
from logprobs_server.__main__ import parse
from logprobs_server.models.progress import console_progress
from logprobs_server.models.resolve import resolve_model


@pytest.fixture(scope="session")
def embedded_folder() -> Path:
    """The embedded default model, in the cache that the server itself uses; fetched if it is not yet there."""
    source = resolve_model(None, parse([], dict(os.environ)).cache_dir, console_progress(sys.stderr))
    assert source.folder is not None
    return source.folder


settings.register_profile("untimed", deadline=None)  # how long an example takes is the machine's business
settings.load_profile("untimed")

# A shell that starts the tests in the background has them ignore interrupts, and what they start does so too.
signal.signal(signal.SIGINT, signal.default_int_handler)
