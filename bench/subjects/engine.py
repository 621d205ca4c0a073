"""The engine alone: jobs straight into it, a list for a listener; what the service costs is the difference."""

from __future__ import annotations

import asyncio
import os
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

from logprobs_server.__main__ import parse
from logprobs_server.app import load
from logprobs_server.engine.engine import TorchEngine
from logprobs_server.engine.events import CompletionDecoded, Event, JobFailed, JobFinished
from logprobs_server.servicer import Ready

from bench.exchange import Task, Told
from bench.subjects.ours import as_request
from bench.subjects.subject import Note, Streaming, serve

__all__ = ["EngineAlone", "opened"]


class EngineAlone(Streaming):
    """Notes events on the engine's own thread."""

    def __init__(self, ready: Ready) -> None:
        self._ready = ready

    async def generate(self, prompt: Sequence[int], task: Task, note: Note) -> None:
        """One job."""
        loop, finished = asyncio.get_running_loop(), asyncio.Event()

        def sink(events: Sequence[Event]) -> None:
            note(events)
            if isinstance(events[-1], JobFinished | JobFailed):
                loop.call_soon_threadsafe(finished.set)

        plan = self._ready.validator.generate(as_request(prompt, task), received_s=time.monotonic())
        self._ready.engine.submit(plan.job, sink)
        await finished.wait()

    def tokens(self, message: Sequence[Event], top: int) -> Told:
        """Those of all events told at once."""
        places = [token.position for event in message if isinstance(event, CompletionDecoded) for token in event.tokens]
        assert all(len(place.top_ids) == top for place in places)
        return [(p.token_id, p.logprob) for p in places if p.token_id is not None and p.logprob is not None]


@contextmanager
def opened(arguments: Sequence[str]) -> Iterator[EngineAlone]:
    """An engine that runs, loaded as the server loads it: on a thread that has ended when the engine's starts."""
    with ThreadPoolExecutor(max_workers=1) as loader:
        ready, engine = loader.submit(load, parse(arguments, dict(os.environ))).result()
    assert isinstance(engine, TorchEngine)
    engine.start()
    try:
        yield EngineAlone(ready)
    finally:
        engine.close()


if __name__ == "__main__":
    serve(opened(sys.argv[1:]))
