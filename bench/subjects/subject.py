"""What programs that are asked have in common: tasks come in on standard input, answers go out, one JSON line each.

Runs in rivals' environments too, and so needs nothing but Python.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, replace
from itertools import chain
from typing import Any, Protocol

from bench.exchange import LATE_AFTER, LATE_NEW_TOKENS, Answer, Stream, Task, Told

__all__ = ["Note", "Scoring", "Streaming", "Subject", "free_port", "serve", "server"]

_POLL_S = 0.02

Note = Callable[[Any], None]
"""Called with every message of a stream as soon as it arrives."""


class Subject(Protocol):
    """Somebody who answers tasks. `ready_s`: seconds a server took to start; None if it is this process."""

    ready_s: float | None

    async def answer(self, task: Task) -> Answer:
        """Does the task and tells how it went."""


def serve(opened: AbstractContextManager[Subject]) -> None:
    """Says when the subject is ready, then answers until standard input ends."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever else is printed is no answer
    with opened as subject, asyncio.Runner() as runner:
        print(json.dumps({"ready_s": subject.ready_s}), file=replies, flush=True)
        for line in sys.stdin:
            answer = runner.run(subject.answer(Task(**json.loads(line))))
            print(json.dumps(asdict(answer)), file=replies, flush=True)


class Streaming(ABC):
    """A subject that takes requests one by one and tells tokens as they come."""

    ready_s: float | None = None
    leaves_out = False
    """Whether a few tokens may be missing from what it streams."""

    @abstractmethod
    async def generate(self, prompt: Sequence[int], task: Task, note: Note) -> None:
        """Has the prompt completed, and notes every message."""

    @abstractmethod
    def tokens(self, message: Any, top: int) -> Told:
        """What a message tells; checks that its tokens have the alternatives."""

    async def answer(self, task: Task) -> Answer:
        """Runs all clients at once, and the late one when the others are under way."""
        clients = [[_Call() for _ in prompts] for prompts in task.prompts]
        calls, late = list(chain.from_iterable(clients)), _Call()
        start = time.perf_counter()
        async with asyncio.TaskGroup() as group:
            for prompts, own in zip(task.prompts, clients, strict=True):
                group.create_task(self._client(prompts, task, own))
            if task.late:
                group.create_task(self._late(task, calls, late))
        seconds = time.perf_counter() - start
        expected = task.completions * task.new_tokens
        streams = [self._stream(call, task, expected) for call in calls] if expected else []
        return Answer(
            seconds=seconds,
            streams=streams,
            told=[call.told for call in calls],
            late=self._stream(late, task, LATE_NEW_TOKENS) if task.late else None,
        )

    async def _client(self, prompts: Sequence[Sequence[int]], task: Task, calls: list[_Call]) -> None:
        for prompt, call in zip(prompts, calls, strict=True):
            call.start = time.perf_counter()
            await self._answer_one(prompt, task, call)

    async def _answer_one(self, prompt: Sequence[int], task: Task, call: _Call) -> None:
        assert task.new_tokens, f"{type(self).__name__} cannot score"
        await self.generate(prompt, task, call.note)

    async def _late(self, task: Task, calls: Sequence[_Call], late: _Call) -> None:
        for call in calls:
            await call.under_way.wait()
        late.start = time.perf_counter()
        await self.generate(task.late, replace(task, new_tokens=LATE_NEW_TOKENS), late.note)

    def _stream(self, call: _Call, task: Task, expected: int) -> Stream:
        """What a call noted, read only now, so that reading takes no time from anyone."""
        read = [(at, tokens) for at, message in call.noted if (tokens := self.tokens(message, task.top))]
        call.told = [token for _, tokens in read for token in tokens]
        least = expected * 9 // 10 if self.leaves_out else expected
        assert least <= len(call.told) <= expected, f"told {len(call.told)} tokens, not {expected}"
        return Stream(start=call.start, times=[at for at, _ in read], counts=[len(tokens) for _, tokens in read])


class Scoring(Streaming):
    """One that scores texts too."""

    @abstractmethod
    async def score(self, prompt: Sequence[int], task: Task) -> list[float]:
        """Log probabilities of the prompt's tokens but for the first, or of the choices' after it."""

    async def _answer_one(self, prompt: Sequence[int], task: Task, call: _Call) -> None:
        if task.new_tokens:
            await super()._answer_one(prompt, task, call)
            return
        scored = [token_id for choice in task.choices for token_id in choice] or prompt[1:]
        logprobs = await self.score(prompt, task)
        assert len(logprobs) == len(scored), f"scored {len(logprobs)} tokens, not {len(scored)}"
        call.told = list(zip(scored, logprobs, strict=True))


class _Call:
    """A request under way."""

    def __init__(self) -> None:
        self.start = 0.0
        self.noted: list[tuple[float, Any]] = []
        self.told: Told = []
        self.under_way = asyncio.Event()

    def note(self, message: Any) -> None:
        self.noted.append((time.perf_counter(), message))
        if len(self.noted) == LATE_AFTER:
            self.under_way.set()


@contextmanager
def server(command: Sequence[str], environment: Mapping[str, str], is_ready: Callable[[], bool]) -> Iterator[float]:
    """A server in a process of its own; gives the seconds from its start until it was ready, and ends it on leaving."""
    start = time.perf_counter()
    with subprocess.Popen(command, env={**os.environ, **environment}) as process:
        try:
            while not is_ready():
                if process.poll() is not None:
                    raise SystemExit(f"{command[0]} ended with status {process.returncode}")
                time.sleep(_POLL_S)
            yield time.perf_counter() - start
        finally:
            process.terminate()


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port
