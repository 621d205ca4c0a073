"""A server in this process that tests can load, watch and stop, and what its answers and refusals amount to.

Reaches the service over a real socket with the generated stubs, and shares no code with the client.
"""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from logprobs.v1 import logprobs_pb2 as pb
from logprobs.v1.logprobs_pb2_grpc import LogprobsServiceStub
from logprobs_server.__main__ import parse
from logprobs_server.app import RunningServer, running_server
from logprobs_server.config import Config
from logprobs_server.engine.engine import TorchEngine

__all__ = [
    "GREEDY",
    "SERVICE",
    "Refusal",
    "Served",
    "Stream",
    "answer",
    "ids",
    "refusal",
    "running",
    "text",
    "uniform",
    "wait_until",
]

SERVICE = "logprobs.v1.LogprobsService"
GREEDY = pb.Sampling(temperature=0)
_PATIENCE_S = 60


class Served:
    """A running server, and a stub that reaches it."""

    def __init__(self, server: RunningServer, stop: Callable[[], None], loop: asyncio.AbstractEventLoop) -> None:
        self._server = server
        self._loop = loop
        self.stop = stop
        self.target = f"127.0.0.1:{server.port}"
        self.channel = grpc.insecure_channel(self.target)
        self.stub = LogprobsServiceStub(self.channel)

    @property
    def engine(self) -> TorchEngine:
        """What runs the model."""
        assert self._server.engine is not None
        return self._server.engine

    def load(self) -> str:
        """Loads the model; returns its name."""
        return asyncio.run_coroutine_threadsafe(self._server.load(), self._loop).result()

    def generate(self, request: pb.GenerateRequest) -> Stream:
        """The whole stream."""
        return Stream(list(self.stub.Generate(request)))

    def score(self, request: pb.ScoreRequest) -> Sequence[pb.ScoredSequence]:
        """The scored sequences."""
        return self.stub.Score(request).sequences

    def wait_until_idle(self) -> None:
        """Waits until nobody holds a block of the KV cache."""
        wait_until(lambda: self.engine.num_free_blocks == self.engine.num_blocks)


@contextmanager
def running(folder: Path, *, loaded: bool = True, **settings: Any) -> Iterator[Served]:
    """Serves the model in `folder` on a free port, on a thread and an event loop of its own; stops on leaving."""
    settings = {"threads": 1, "kv_cache_mib": 64, "max_sequences": 16, **settings}
    config = Config(
        cache_dir=parse([], dict(os.environ)).cache_dir,
        model=str(folder),
        port=0,
        dtype="float32",
        device="cpu",
        **settings,
    )
    started: Future[Served] = Future()
    thread = threading.Thread(target=lambda: asyncio.run(_serve(config, loaded, started)), name="server")
    thread.start()
    try:
        served = started.result()
        with served.channel:
            yield served
            served.stop()
            thread.join()
    finally:
        if started.exception() is None:
            started.result().stop()
        thread.join()


async def _serve(config: Config, loaded: bool, started: Future[Served]) -> None:
    loop, stop = asyncio.get_running_loop(), asyncio.Event()
    try:
        async with running_server(config) as server:
            if loaded:
                await server.load()
            started.set_result(Served(server, lambda: _set(loop, stop), loop))
            await stop.wait()
    except BaseException as error:
        if started.done():
            raise
        started.set_exception(error)


def _set(loop: asyncio.AbstractEventLoop, event: asyncio.Event) -> None:
    if not loop.is_closed():
        loop.call_soon_threadsafe(event.set)


class Stream:
    """The messages of one Generate call, and what they tell when put together."""

    def __init__(self, responses: Sequence[pb.GenerateResponse]) -> None:
        self.responses = responses

    @property
    def kinds(self) -> list[str | None]:
        """Which event each message is."""
        return [response.WhichOneof("event") for response in self.responses]

    @property
    def started(self) -> pb.GenerationStarted:
        """The first event."""
        return self.responses[0].started

    @property
    def prompt_tokens(self) -> list[pb.Token]:
        """The scored prompt."""
        return [token for response in self.responses for token in response.prompt_scored.tokens]

    def tokens(self, completion: int = 0) -> list[pb.Token]:
        """The tokens of one completion."""
        return [token for delta in self._deltas(completion) for token in delta.tokens]

    def token_ids(self, completion: int = 0) -> list[int]:
        """The ids of one completion's tokens."""
        return [token.id for token in self.tokens(completion)]

    def text(self, completion: int = 0) -> str:
        """The text of one completion."""
        return "".join(delta.text for delta in self._deltas(completion))

    def bytes(self, completion: int = 0) -> bytes:
        """The bytes of one completion's tokens."""
        return b"".join(token.bytes for token in self.tokens(completion))

    def finished(self, completion: int = 0) -> pb.CompletionFinished:
        """The last event of one completion."""
        [event] = [r.finished for r in self.responses if r.HasField("finished") and r.finished.completion == completion]
        return event

    @property
    def ranked(self) -> pb.CompletionsRanked:
        """The last event of a stream with several completions."""
        return self.responses[-1].ranked

    def _deltas(self, completion: int) -> Iterator[pb.CompletionDelta]:
        for response in self.responses:
            yield from (delta for delta in response.decoded.deltas if delta.completion == completion)


@dataclass(frozen=True, slots=True)
class Refusal:
    """A call's error, its details unpacked."""

    code: grpc.StatusCode
    message: str
    info: error_details_pb2.ErrorInfo
    violations: Sequence[tuple[str, str]]
    retry_s: float | None
    details_bytes: int

    @property
    def fields(self) -> list[str]:
        """The fields that break rules."""
        return [field for field, _ in self.violations]


def refusal(call: Callable[[], object]) -> Refusal:
    """The error that a call ends with, which must have our details."""
    with pytest.raises(grpc.RpcError) as caught:
        call()
    status: Any = rpc_status.from_call(caught.value)
    details: dict[str, Any] = {}
    for packed in status.details:
        kind = packed.TypeName().rpartition(".")[2]
        details[kind] = getattr(error_details_pb2, kind)()
        packed.Unpack(details[kind])
    bad = details.get("BadRequest", error_details_pb2.BadRequest())
    retry = details.get("RetryInfo")
    return Refusal(
        code=caught.value.code(),
        message=status.message,
        info=details["ErrorInfo"],
        violations=[(violation.field, violation.description) for violation in bad.field_violations],
        retry_s=None if retry is None else retry.retry_delay.ToTimedelta().total_seconds(),
        details_bytes=sum(packed.ByteSize() for packed in status.details),
    )


def answer(served: Served, request: Any) -> Any:
    """What a request is answered with, whichever method takes it; a stream as the list of its messages."""
    method = type(request).__name__.removesuffix("Request")
    response = getattr(served.stub, method)(request)
    return list(response) if method == "Generate" else response


def wait_until(holds: Callable[[], bool]) -> None:
    """Waits for something that is bound to happen."""
    deadline = time.monotonic() + _PATIENCE_S
    while not holds():
        assert time.monotonic() < deadline, "it did not happen"
        threading.Event().wait(0.005)


def text(content: str) -> pb.Input:
    """Text as an input."""
    return pb.Input(text=content)


def ids(token_ids: Sequence[int]) -> pb.Input:
    """Token ids as an input."""
    return pb.Input(token_ids=pb.TokenIds(ids=token_ids))


def uniform(seed: int) -> pb.Sampling:
    """Sampling that draws any token as likely as any other: special ones and broken characters soon come."""
    return pb.Sampling(temperature=1e6, seed=seed)
