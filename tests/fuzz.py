"""Sends random, mutated and damaged requests of every method to a live server, many at a time.

    make fuzz ARGS="--requests 100000"

Every call must end well or be refused for what it broke: no INTERNAL, no UNKNOWN, no NaN in an answer. Afterwards no
block and no sequence may be held, memory must be flat, and a plain request must give, bit for bit, what it gave before.
Request number i of a seed is always the same: `--first i --requests 1` sends it alone.
"""

from __future__ import annotations

import argparse
import math
import os
import random
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import psutil
from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from google.rpc import code_pb2
from harness import SERVICE, Served, ids, running
from logprobs.v1 import logprobs_pb2 as pb
from logprobs_server.__main__ import parse
from logprobs_server.models.progress import console_progress
from logprobs_server.models.resolve import resolve_model
from random_requests import METHODS, damaged, mutated, sound_request
from tiny_models import save_tiny_model

__all__ = ["SETTINGS", "Report", "fuzz"]

SETTINGS: dict[str, Any] = {
    "context_length": 64,
    "kv_cache_mib": 8,
    "max_completions": 8,
    "max_continuations": 16,
    "max_request_bytes": 1 << 17,
    "max_response_bytes": 1 << 17,
    "allow_full_distribution": True,
}
"""Limits low enough that whatever they allow takes milliseconds, and all of the cache is soon in use."""
KINDS = ("sound", "mutated", "damaged")
_CALLERS = 8
_WEIGHTS = {"Score": 4, "ScoreStream": 4, "Generate": 6, "Tokenize": 2, "Detokenize": 2, "GetModel": 1}
_REFUSALS = {grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.RESOURCE_EXHAUSTED}  # the latter: gRPC's message size
_GIVEN_UP = {grpc.StatusCode.CANCELLED, grpc.StatusCode.DEADLINE_EXCEEDED}
_FLAT_BYTES = 64 << 20


@dataclass
class Report:
    """What became of the requests.

    outcomes: how many of each kind of request ended with each status.
    failures: what must not be, in words.
    memory: bytes that the process, client and server, held after each tenth of the requests.
    """

    outcomes: Counter[tuple[str, str]] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    memory: list[int] = field(default_factory=list)

    @property
    def flat(self) -> bool:
        """Whether memory grew by no more than noise once a fifth of the requests had warmed everything up."""
        return self.memory[-1] - self.memory[1] <= _FLAT_BYTES

    def lines(self) -> Iterator[str]:
        """For people."""
        for kind in KINDS:
            found = {code: count for (of, code), count in sorted(self.outcomes.items()) if of == kind}
            yield f"{kind}: " + ", ".join(f"{count:,} {code}" for code, count in found.items())
        yield "memory after each tenth, MiB: " + " ".join(str(size >> 20) for size in self.memory)
        yield from self.failures


def fuzz(served: Served, count: int, *, seed: int = 0, first: int = 0) -> Report:
    """Sends the requests and looks at what they leave behind."""
    before, report, lock = plain_answers(served), Report(), threading.Lock()
    vocabulary_size = served.stub.GetModel(pb.GetModelRequest()).vocabulary_size

    def send(number: int) -> None:
        kind, code, failure = _sent(served.channel, random.Random(f"{seed} {number}"), vocabulary_size)
        with lock:
            report.outcomes[kind, code] += 1
            if failure:
                report.failures.append(f"request {number}: {failure}")

    with ThreadPoolExecutor(_CALLERS) as callers:
        for tenth in range(10):
            numbers = range(first + count * tenth // 10, first + count * (tenth + 1) // 10)
            list(callers.map(send, numbers))
            report.memory.append(psutil.Process().memory_info().rss)
    served.wait_until_idle()
    if served.engine._states or served.engine._scheduler._sequences:
        report.failures.append("the engine still holds jobs or sequences")
    if plain_answers(served) != before:
        report.failures.append("a plain request is answered differently than before")
    return report


def plain_answers(served: Served) -> list[bytes]:
    """What plain requests are answered with, but for what the cache spared."""
    context, options = ids([5, 17, 99, 3, 200, 41, 7]), pb.LogprobOptions(top_count=5, entropy=True)
    scored = served.stub.Score(pb.ScoreRequest(context=context, logprobs=options))
    request = pb.GenerateRequest(prompt=context, max_tokens=12, sampling=pb.Sampling(seed=3), logprobs=options)
    drawn = list(served.stub.Generate(request))
    drawn[0].started.ClearField("cached_token_count")
    tokens = [token for response in drawn for delta in response.decoded.deltas for token in delta.tokens]
    return [m.SerializeToString(deterministic=True) for m in (*scored.sequences, drawn[0], *tokens, drawn[-1])]


def _sent(channel: grpc.Channel, draw: random.Random, vocabulary_size: int) -> tuple[str, str, str]:
    """Sends one request: its kind, the name of its status, and what is wrong with that, if anything."""
    method = draw.choices(METHODS, [_WEIGHTS[m.name] for m in METHODS])[0]
    kind = draw.choice(KINDS)
    count = draw.randrange(1, 7) if method.client_streaming else 1
    datas = [_data(draw, method, kind, vocabulary_size) for _ in range(count)]
    timeout = draw.choice((0.001, 0.01, 0.05)) if draw.random() < 0.03 else None
    leave_after = draw.randrange(3) if draw.random() < 0.05 else None
    try:
        problems = _read(_call(channel, method, datas, timeout), leave_after)
        code = "OK"
    except grpc.RpcError as error:
        status: Any = error.code()  # type: ignore[attr-defined]
        code, given_up = status.name, leave_after is not None or timeout is not None
        fine = status in _REFUSALS or (status in _GIVEN_UP and given_up)
        problems = "" if fine else f"{code}: {error.details()}"  # type: ignore[attr-defined]
    return kind, code, problems and f"{method.name} {kind} {problems}: {[data.hex() for data in datas]}"


def _data(draw: random.Random, method: MethodDescriptor, kind: str, vocabulary_size: int) -> bytes:
    request = sound_request(draw, method, vocabulary_size)
    if kind == "mutated":
        request = mutated(draw, request)
    data = request.SerializeToString()
    return damaged(draw, data) if kind == "damaged" else data


def _call(channel: grpc.Channel, method: MethodDescriptor, datas: list[bytes], timeout: float | None) -> Any:
    """The messages that a method answers bytes with; the call itself where it streams."""
    path, parse_answer = f"/{SERVICE}/{method.name}", GetMessageClass(method.output_type).FromString
    if method.client_streaming:
        return channel.stream_stream(path, bytes, parse_answer)(iter(datas), timeout=timeout)
    if method.server_streaming:
        return channel.unary_stream(path, bytes, parse_answer)(datas[0], timeout=timeout)
    return [channel.unary_unary(path, bytes, parse_answer)(datas[0], timeout=timeout)]


def _read(call: Any, leave_after: int | None) -> str:
    """Reads an answer, or the beginning of it; returns what is wrong with it."""
    for number, message in enumerate(call):
        if _holds_nan(message):
            return "NaN"
        if isinstance(message, pb.ScoreStreamResponse) and message.error.code not in (0, code_pb2.INVALID_ARGUMENT):
            return f"an item's {message.error.reason}: {message.error.message}"
        if number == leave_after and hasattr(call, "cancel"):
            call.cancel()
            return ""
    return ""


def _holds_nan(message: Message) -> bool:
    return any(
        any(map(_is_nan, value)) if of.is_repeated and not isinstance(value, Mapping) else _is_nan(value)
        for of, value in message.ListFields()
    )


def _is_nan(value: Any) -> bool:
    return _holds_nan(value) if isinstance(value, Message) else isinstance(value, float) and math.isnan(value)


def main() -> int:
    """Fuzzes as the arguments say; prints the figures; the exit status tells whether all was well."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--first", type=int, default=0, help="number of the first request")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--embedded", action="store_true", help="the default model instead of a tiny random one")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder, settings = Path(name), SETTINGS
        if args.embedded:
            source = resolve_model(None, parse([], dict(os.environ)).cache_dir, console_progress(sys.stderr))
            assert source.folder is not None
            folder, settings = source.folder, {**SETTINGS, "kv_cache_mib": 64}
        else:
            save_tiny_model("llama", folder)
        start = time.perf_counter()
        with running(folder, **settings) as served:
            report = fuzz(served, args.requests, seed=args.seed, first=args.first)
    print(
        f"{args.requests:,} requests in {time.perf_counter() - start:.0f} s, seed {args.seed}",
        *report.lines(),
        sep="\n",
    )
    return int(bool(report.failures) or not report.flat)


if __name__ == "__main__":
    sys.exit(main())
