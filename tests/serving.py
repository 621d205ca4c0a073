"""A server in this process, on a thread and an event loop of its own, and stubs that reach it over a real socket."""

from __future__ import annotations

import asyncio
import os
import queue
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
from logprobs.v1 import logprobs_pb2 as pb
from logprobs.v1.logprobs_pb2_grpc import LogprobsServiceStub
from logprobs_server.__main__ import parse
from logprobs_server.app import running_server
from logprobs_server.config import Config
from logprobs_server.engine import kernels
from tiny_models import ARCHITECTURES

__all__ = [
    "BOTH_PATHS",
    "Completion",
    "collected",
    "given",
    "path_name",
    "served_elsewhere",
    "serving",
    "skip_without_kernels",
]


BOTH_PATHS = [(name, False) for name in ARCHITECTURES] + [(name, True) for name in ARCHITECTURES if name != "opt"]
"""Tiny architectures, and whether on the lean path; OPT is for transformers' own pass alone."""


def path_name(param: tuple[str, bool]) -> str:
    """How a test's id tells an architecture and its path."""
    return f"{param[0]}-{'lean' if param[1] else 'general'}"


def skip_without_kernels(lean: bool) -> None:
    """Skips a test of the lean path where there can be none; where there can, the kernels must build and load."""
    if not lean:
        return
    if not torch.backends.cpu.get_cpu_capability().startswith("AVX") or shutil.which("c++") is None:
        pytest.skip("this machine has neither AVX-512 nor AVX2, or no C++ compiler")
    assert kernels.load(parse([], dict(os.environ)).cache_dir / "kernels"), "the kernels do not build or load"


@dataclass(slots=True)
class Completion:
    """The tokens of one completion, put together from its stream, and what ended it."""

    tokens: list[pb.Token] = field(default_factory=list)
    finished: pb.CompletionFinished | None = None

    @property
    def token_ids(self) -> list[int]:
        """What was drawn."""
        return [token.id for token in self.tokens]


@contextmanager
def serving(folder: Path, **settings: Any) -> Iterator[LogprobsServiceStub]:
    """Serves the model in `folder` on a free port; gives a stub, and stops the server on leaving."""
    settings = {"dtype": "float32", "device": "cpu", **settings}
    config = Config(cache_dir=parse([], dict(os.environ)).cache_dir, model=str(folder), port=0, **settings)
    ports: queue.SimpleQueue[int | BaseException] = queue.SimpleQueue()
    stop = threading.Event()
    thread = threading.Thread(target=lambda: asyncio.run(_serve(config, ports, stop)), name="server")
    thread.start()
    try:
        port = ports.get()
        if isinstance(port, BaseException):
            raise port
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            yield LogprobsServiceStub(channel)
    finally:
        stop.set()
        thread.join()


@contextmanager
def served_elsewhere(folder: Path) -> Iterator[tuple[int, str]]:
    """Serves the model in `folder` by a process of its own; gives the process's id and the address."""
    command = [sys.executable, "-m", "logprobs_server", "--model", str(folder), "--port", "0", "--dtype", "float32"]
    with subprocess.Popen([*command, "--device", "cpu"], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield process.pid, process.stdout.readline().split()[-1]
        finally:
            process.terminate()


async def _serve(config: Config, ports: queue.SimpleQueue[int | BaseException], stop: threading.Event) -> None:
    try:
        async with running_server(config) as server:
            await server.load()
            ports.put(server.port)
            await asyncio.to_thread(stop.wait)
    except BaseException as error:
        ports.put(error)


def given(token_ids: Sequence[int]) -> pb.Input:
    """Token ids as an input."""
    return pb.Input(token_ids=pb.TokenIds(ids=token_ids))


def collected(stream: Iterator[pb.GenerateResponse], count: int = 1) -> list[Completion]:
    """The completions of a stream, which must all have finished."""
    completions = [Completion() for _ in range(count)]
    for response in stream:
        for delta in response.decoded.deltas:
            completions[delta.completion].tokens.extend(delta.tokens)
        if response.WhichOneof("event") == "finished":
            completions[response.finished.completion].finished = response.finished
    assert all(completion.finished is not None for completion in completions)
    return completions
