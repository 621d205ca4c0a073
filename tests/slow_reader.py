"""Scores thousands of sequences over one stream for a reader who is slow, and tells how much both sides hold meanwhile.

    make slow-reader ARGS="--sequences 5000"

The server runs in a process of its own. All answers together would take hundreds of MiB; the server may hold 64 answers
or 64 MiB of them, the client what is in flight, so neither may grow by much more while the reader sleeps. Measured
with 5,000 sequences: the server grew by 75 MiB, the client by 6.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
from logprobs import Client
from serving import served_elsewhere
from tiny_models import VOCABULARY_SIZE, save_tiny_model

LIMIT_BYTES = 128 << 20
TOP = 20


def sequences(count: int, seed: int = 0) -> Iterator[list[int]]:
    """Token ids, 50 to 500 each."""
    draw = random.Random(seed)
    for _ in range(count):
        yield [draw.randrange(VOCABULARY_SIZE) for _ in range(draw.randint(50, 500))]


class Watch:
    """The most memory that processes held, in bytes, since the watch began; and what they held then."""

    def __init__(self, **pids: int) -> None:
        self._processes = {name: psutil.Process(pid) for name, pid in pids.items()}
        self.first = {name: process.memory_info().rss for name, process in self._processes.items()}
        self.most = dict(self.first)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._look)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._ended.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._ended.wait(0.05):
            for name, process in self._processes.items():
                self.most[name] = max(self.most[name], process.memory_info().rss)


def read_slowly(target: str, count: int, pause_s: float, batch: int) -> int:
    """Reads all results, with a pause after each batch; returns the bytes that they came to."""
    size = 0
    with Client(target) as client, client.score_stream(sequences(count), top=TOP) as stream:
        for number, result in enumerate(stream, 1):
            assert result.response is not None
            size += result.response.ByteSize()
            if number % batch == 0:
                time.sleep(pause_s)
    return size


def main() -> int:
    """Runs as the arguments say; the exit status tells whether memory stayed within the limit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sequences", type=int, default=5_000)
    parser.add_argument("--pause-s", type=float, default=2.0, help="after each batch")
    parser.add_argument("--batch", type=int, default=250)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        save_tiny_model("llama", Path(folder))
        with served_elsewhere(Path(folder)) as (pid, target):
            read_slowly(target, 200, 0, args.batch)  # warms both up
            with Watch(server=pid, client=psutil.Process().pid) as watch:
                size = read_slowly(target, args.sequences, args.pause_s, args.batch)
    print(f"{args.sequences:,} sequences, {size >> 20:,} MiB of answers")
    grown = {name: most - watch.first[name] for name, most in watch.most.items()}
    for name, growth in grown.items():
        print(f"{name}: {watch.first[name] >> 20} MiB before, at most {growth >> 20} MiB more meanwhile")
    return int(max(grown.values()) > LIMIT_BYTES)


if __name__ == "__main__":
    sys.exit(main())
