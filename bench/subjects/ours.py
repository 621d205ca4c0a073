"""The service, started as users start it, over its port."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import TYPE_CHECKING

import grpc
from logprobs.requests import generate_request, score_request
from logprobs.v1 import logprobs_pb2 as pb
from logprobs.v1.logprobs_pb2_grpc import LogprobsServiceStub
from logprobs_server.demo import local_server

from bench.exchange import Task, Told
from bench.subjects.subject import Note, Scoring, serve

if TYPE_CHECKING:
    from logprobs.v1.logprobs_pb2_grpc import LogprobsServiceAsyncStub  # a type alone

__all__ = ["Service", "as_request", "opened"]


def as_request(prompt: Sequence[int], task: Task) -> pb.GenerateRequest:
    """The request that has the prompt completed as the task wants it."""
    return generate_request(
        prompt,
        completion_count=task.completions,
        max_tokens=task.new_tokens,
        temperature=task.temperature,
        seed=1,
        top=task.top,
        ignore_eos=True,
    )


class Service(Scoring):
    """Calls without what the client library adds: a client costs the two cores it shares with the server."""

    def __init__(self, target: str, ready_s: float) -> None:
        self.ready_s = ready_s
        self._target = target

    @cached_property
    def _stub(self) -> LogprobsServiceAsyncStub:
        """Made within the event loop that is to run it."""
        return LogprobsServiceStub(grpc.aio.insecure_channel(self._target))

    async def generate(self, prompt: Sequence[int], task: Task, note: Note) -> None:
        """One call of Generate."""
        async for message in self._stub.Generate(as_request(prompt, task)):
            note(message)

    def tokens(self, message: pb.GenerateResponse, top: int) -> Told:
        """Those of all deltas of a message."""
        tokens = [token for delta in message.decoded.deltas for token in delta.tokens]
        assert all(len(token.top) == top for token in tokens)
        return [(token.id, token.logprob) for token in tokens]

    async def score(self, prompt: Sequence[int], task: Task) -> list[float]:
        """One call of Score."""
        response = await self._stub.Score(score_request(prompt, task.choices, top=task.top))
        tokens = [token for sequence in response.sequences for token in sequence.tokens if token.HasField("logprob")]
        assert all(len(token.top) == task.top for token in tokens)
        return [token.logprob for token in tokens]


@contextmanager
def opened(arguments: Sequence[str]) -> Iterator[Service]:
    """A server that runs."""
    start = time.perf_counter()
    with local_server(arguments) as target:
        yield Service(target, time.perf_counter() - start)


if __name__ == "__main__":
    serve(opened(sys.argv[1:]))
