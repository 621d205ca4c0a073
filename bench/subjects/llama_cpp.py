"""llama.cpp's `llama-server`, over HTTP. It tells nothing of prompts' tokens, so it cannot score."""

from __future__ import annotations

import asyncio
import json
import os
import sys
import urllib.error
import urllib.request
from collections import deque
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from bench.exchange import Task, Told
from bench.subjects.subject import Note, Streaming, free_port, serve, server

__all__ = ["WHOLE", "LlamaServer", "in_their_places", "opened"]

WHOLE = "whole"
"""Has it answer at once, which tells the ids of those tokens too whose log probabilities it leaves out."""

_SLOTS = 32
_SLOT_TOKENS = 2304
"""Room for the longest prompt and what follows it."""
_EVENT, _BODY = b"data: {", b"{"
_MOST_BYTES = 1 << 24
"""Of a line of an answer."""


class LlamaServer(Streaming):
    """One connection per request: it drops those that are kept."""

    leaves_out = True  # those that end within a character; its last event says how many there were

    def __init__(self, port: int, ready_s: float, *, streams: bool) -> None:
        self._port = port
        self._streams = streams
        self.ready_s = ready_s

    async def generate(self, prompt: Sequence[int], task: Task, note: Note) -> None:
        """One call of /completion; every line with an event, or the one answer, is noted."""
        body = {
            "prompt": prompt,
            "n_predict": task.new_tokens,
            "temperature": task.temperature,
            "top_k": 0,
            "top_p": 1.0,
            "min_p": 0.0,
            "n_probs": task.top,
            "ignore_eos": True,
            "stream": self._streams,
            "return_tokens": not self._streams,
            **({"n_cmpl": task.completions} if task.completions > 1 else {}),
        }
        async for line in self._post("/completion", json.dumps(body).encode()):
            if line.startswith(_EVENT if self._streams else _BODY):
                note(line)

    def tokens(self, message: bytes, top: int) -> Told:
        """Those of an event, or of the whole answer, None for log probabilities that it leaves out."""
        event = json.loads(message[message.index(_BODY) :])
        if self._streams and event["stop"]:
            assert event["tokens_predicted"] == event["generation_settings"]["n_predict"], "it stopped early"
            return []
        probabilities = event["completion_probabilities"]
        assert all(len(each["top_logprobs"]) == top for each in probabilities)
        told = [(each["id"], each["logprob"]) for each in probabilities]
        return told if self._streams else in_their_places(event["tokens"], told)

    async def _post(self, path: str, body: bytes) -> AsyncIterator[bytes]:
        reader, writer = await asyncio.open_connection("127.0.0.1", self._port, limit=_MOST_BYTES)
        head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length: {len(body)}\r\n\r\n"
        writer.write(head.encode() + body)
        status = await reader.readline()
        assert b" 200 " in status, status + await reader.read()
        async for line in reader:
            yield line
        writer.close()


def in_their_places(token_ids: Sequence[int], told: Told) -> Told:
    """What is told of some of the tokens, in order, beside None for the others; None for all if places are not certain.

    llama.cpp tells nothing of a token that ends within a character.
    """

    def placed(ids: Iterable[int], known: Iterable[tuple[int, float | None]]) -> list[float | None]:
        left = deque(known)
        return [left.popleft()[1] if left and left[0][0] == token_id else None for token_id in ids]

    forwards, backwards = placed(token_ids, told), placed(reversed(token_ids), reversed(told))[::-1]
    return list(zip(token_ids, forwards if forwards == backwards else [None] * len(token_ids), strict=True))


@contextmanager
def opened(binaries: str, model: str, threads: str, dtype: str, answers: str = "") -> Iterator[LlamaServer]:
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
        yield LlamaServer(port, ready_s, streams=answers != WHOLE)


if __name__ == "__main__":
    serve(opened(*sys.argv[1:]))
