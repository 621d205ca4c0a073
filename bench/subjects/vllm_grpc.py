"""vLLM on the CPU behind its gRPC servicer. Scores are the log probabilities of a prompt before one token more."""

from __future__ import annotations

import asyncio
import ctypes.util
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from itertools import count
from pathlib import Path
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from smg_grpc_proto import vllm_engine_pb2 as pb
from smg_grpc_proto import vllm_engine_pb2_grpc as services

from bench.exchange import Task, Told
from bench.subjects.subject import Note, Scoring, free_port, serve, server

__all__ = ["VllmServer", "opened"]

_KV_CACHE_GIB = 4
_MAX_SEQUENCES = 32
_CONTEXT_LENGTH = 2304
"""Room for the longest prompt and what follows it."""


class VllmServer(Scoring):
    """One call of Generate per request, and per text to score."""

    def __init__(self, target: str, ready_s: float) -> None:
        self.ready_s = ready_s
        self._target = target
        self._numbers = count()

    @cached_property
    def _stub(self) -> Any:
        """Made within the event loop that is to run it."""
        unbounded = [("grpc.max_receive_message_length", -1)]
        return services.VllmEngineStub(grpc.aio.insecure_channel(self._target, options=unbounded))

    async def generate(self, prompt: Sequence[int], task: Task, note: Note) -> None:
        """Tokens come in chunks, the last of them once more when all is complete."""
        sampling = pb.SamplingParams(
            max_tokens=task.new_tokens,
            n=task.completions,
            temperature=task.temperature,
            logprobs=task.top,
            ignore_eos=True,
        )
        async for message in self._stub.Generate(self._request(prompt, sampling, stream=True)):
            if message.WhichOneof("response") == "chunk":
                note(message.chunk)

    def tokens(self, message: Any, top: int) -> Told:
        """Those of a chunk."""
        alternatives = message.output_logprobs.top_logprobs
        assert len(alternatives) == len(message.token_ids)
        assert all(len(each.token_ids) >= top for each in alternatives)
        return list(zip(message.token_ids, message.output_logprobs.token_logprobs, strict=True))

    async def score(self, prompt: Sequence[int], task: Task) -> list[float]:
        """Every choice comes with the prompt in front, which is computed and told again each time."""
        texts = [[*prompt, *choice] for choice in task.choices] or [list(prompt)]
        told = await asyncio.gather(*(self._scored(text, task.top) for text in texts))
        assert [len(logprobs) for logprobs in told] == [len(text) - 1 for text in texts]
        lengths = [len(choice) for choice in task.choices] or [len(prompt) - 1]
        return [p for logprobs, length in zip(told, lengths, strict=True) for p in logprobs[-length:]]

    async def _scored(self, text: Sequence[int], top: int) -> list[float]:
        sampling = pb.SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=top)
        told: list[Any] = []
        async for message in self._stub.Generate(self._request(text, sampling, stream=False)):
            told += message.complete.input_logprobs.token_logprobs
        return [each.value for each in told if each.HasField("value")]

    def _request(self, token_ids: Sequence[int], sampling: Any, *, stream: bool) -> Any:
        tokenized = pb.TokenizedInput(input_ids=token_ids)
        number = f"bench-{next(self._numbers)}"
        return pb.GenerateRequest(request_id=number, tokenized=tokenized, sampling_params=sampling, stream=stream)


@contextmanager
def opened(folder: str, dtype: str, threads: str) -> Iterator[VllmServer]:
    """A server that runs on all cores, with the allocator that it asks for where there is one."""
    port = free_port()
    command = [
        *(sys.executable, "-m", "vllm.entrypoints.launchers.grpc_server", "--model", folder, "--dtype", dtype),
        *("--max-model-len", str(_CONTEXT_LENGTH), "--max-num-seqs", str(_MAX_SEQUENCES)),
        *("--host", "127.0.0.1", "--port", str(port)),
    ]
    libraries = [str(Path(sys.prefix, "lib", "libiomp5.so")), ctypes.util.find_library("tcmalloc_minimal")]
    environment = {
        "VLLM_CPU_KVCACHE_SPACE": str(_KV_CACHE_GIB),
        "VLLM_CPU_OMP_THREADS_BIND": f"0-{int(threads) - 1}",  # by default one core is left to its scheduler
        "LD_PRELOAD": ":".join(library for library in libraries if library),
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),  # compiles with its own ninja
    }
    target = f"127.0.0.1:{port}"
    with grpc.insecure_channel(target) as channel:
        health = health_pb2_grpc.HealthStub(channel)

        def is_ready() -> bool:
            try:
                reply = health.Check(health_pb2.HealthCheckRequest(), timeout=1)
            except grpc.RpcError:
                return False
            return bool(reply.status == health_pb2.HealthCheckResponse.SERVING)

        with server(command, environment, is_ready) as ready_s:
            yield VllmServer(target, ready_s)


if __name__ == "__main__":
    serve(opened(*sys.argv[1:]))
