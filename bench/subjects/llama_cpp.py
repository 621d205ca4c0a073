"""llama.cpp's `llama-server`, over HTTP. It tells nothing of prompts' tokens, so it cannot score."""

from __future__ import annotations

import asyncio
import json
import os
import sys
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from bench.exchange import Task, Told
from bench.subjects.subject import Note, Streaming, free_port, serve, server

__all__ = ["LlamaServer", "opened"]

_SLOTS = 32
_SLOT_TOKENS = 2304
"""Room for the longest prompt and what follows it."""
_EVENT = b"data: {"


class LlamaServer(Streaming):
    """One connection per request: it drops those that are kept."""

    def __init__(self, port: int, ready_s: float) -> None:
        self._port = port
        self.ready_s = ready_s

    async def generate(self, prompt: Sequence[int], task: Task, note: Note) -> None:
        """One call of /completion; every line with an event is noted."""
        body = {
            "prompt": prompt,
            "n_predict": task.new_tokens,
            "temperature": task.temperature,
            "top_k": 0,
            "top_p": 1.0,
            "min_p": 0.0,
            "n_probs": task.top,
            "ignore_eos": True,
            "stream": True,
            **({"n_cmpl": task.completions} if task.completions > 1 else {}),
        }
        async for line in self._post("/completion", json.dumps(body).encode()):
            if line.startswith(_EVENT):
                note(line)

    def tokens(self, message: bytes, top: int) -> Told:
        """Those of an event."""
        event = json.loads(message[len(_EVENT) - 1 :])
        probabilities = [] if event["stop"] else event["completion_probabilities"]
        assert all(len(each["top_logprobs"]) == top for each in probabilities)
        return [(each["id"], each["logprob"]) for each in probabilities]

    async def _post(self, path: str, body: bytes) -> AsyncIterator[bytes]:
        reader, writer = await asyncio.open_connection("127.0.0.1", self._port)
        head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length: {len(body)}\r\n\r\n"
        writer.write(head.encode() + body)
        status = await reader.readline()
        assert b" 200 " in status, status + await reader.read()
        async for line in reader:
            yield line
        writer.close()


@contextmanager
def opened(binaries: str, model: str, threads: str, dtype: str) -> Iterator[LlamaServer]:
    """A server that runs, with as many slots as there are clients and nothing kept for slots that are idle."""
    port = free_port()
    kv_cache = "f32" if dtype == "float32" else "f16"  # its own default, the fastest it has
    command = [
        *(str(Path(binaries) / "llama-server"), "--model", model, "--port", str(port), "--threads", threads),
        *("--parallel", str(_SLOTS), "--ctx-size", str(_SLOTS * _SLOT_TOKENS), "--cache-ram", "0", "--no-webui"),
        *("--cache-type-k", kv_cache, "--cache-type-v", kv_cache),
    ]

    def is_ready() -> bool:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as reply:
                return bool(reply.status == 200)
        except (urllib.error.URLError, OSError):
            return False

    with server(command, {"LD_LIBRARY_PATH": os.fspath(binaries)}, is_ready) as ready_s:
        yield LlamaServer(port, ready_s)


if __name__ == "__main__":
    serve(opened(*sys.argv[1:]))
