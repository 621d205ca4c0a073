"""Whatever comes over the wire is answered or refused for what it broke, and leaves nothing behind."""

from __future__ import annotations

from itertools import count
from pathlib import Path

import pytest
from fuzz import SETTINGS, fuzz
from harness import running
from logprobs_server.engine.types import Job, Sink, Ticket

COUNT = 1_500


def test_random_requests_end_well_or_are_refused_and_leave_nothing_behind(tiny_folder: Path) -> None:
    with running(tiny_folder, **SETTINGS) as served:
        report = fuzz(served, COUNT, seed=1)
    assert report.failures == []
    assert report.outcomes["sound", "OK"] > 5 * report.outcomes["sound", "INVALID_ARGUMENT"]
    assert report.outcomes["mutated", "OK"] > COUNT // 20
    assert report.outcomes["mutated", "INVALID_ARGUMENT"] > COUNT // 20
    assert report.outcomes["damaged", "INVALID_ARGUMENT"] > COUNT // 10


def test_the_fuzzer_notices_errors_of_ours(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with running(tiny_folder, **SETTINGS) as served:
        submit, submitted = served.engine.submit, count()

        def fails(job: Job, sink: Sink) -> Ticket:
            if next(submitted) in range(40, 60):  # of one alone, its caller may have left before it is answered
                raise RuntimeError
            return submit(job, sink)

        monkeypatch.setattr(served.engine, "submit", fails)
        failures = fuzz(served, 300).failures
    assert any("INTERNAL" in failure for failure in failures)
