"""`make bench`: the service over its port beside transformers, alternating, on the embedded model; ratios, not times.

Expected ceilings: decoding reads all weights once a step, so tokens per second of one stream are at most the memory's
bytes per second over the weights' bytes; scoring takes two operations per weight and token.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import median

import torch
from logprobs_server.__main__ import parse
from logprobs_server.demo import local_server
from logprobs_server.models.progress import console_progress
from logprobs_server.models.resolve import resolve_model
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer

from bench import machine, ours
from bench.workload import QUESTIONS

__all__ = ["main"]

_WEIGHTS = 134_515_008
"""Of SmolLM2-135M, the tied head counted once."""


def main() -> None:
    """Runs every question several times, ours and theirs in turn, and prints a table and one JSON line."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--runs", type=int, default=3)
    options = parser.parse_args()
    folder = resolve_model(None, parse([], dict(os.environ)).cache_dir, console_progress(sys.stderr)).folder
    assert folder is not None
    dtype = getattr(torch, options.dtype)
    bandwidth, flops = machine.read_bytes(), machine.product_flops(dtype)
    results = _measure(folder, options.dtype, options.runs)
    ceilings = {
        "decode, 1 stream": bandwidth / (_WEIGHTS * dtype.itemsize),
        "score, 16 x 256 tokens": flops / (2 * _WEIGHTS),
        "score, 1 x 2,000 tokens": flops / (2 * _WEIGHTS),
    }
    _print(results, ceilings)
    print(
        json.dumps(
            {
                "dtype": options.dtype,
                "torch": torch.__version__,
                "threads": torch.get_num_threads(),
                "read_bytes_per_s": round(bandwidth),
                "product_flops": round(flops),
                "seconds": results,
            }
        )
    )


def _measure(folder: Path, dtype: str, runs: int) -> dict[str, dict[str, list[float]]]:
    """Seconds of every run, by question, of ours and of transformers."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    command = [sys.executable, "-m", "bench.transformers_peer", str(folder), dtype]
    results: dict[str, dict[str, list[float]]] = {q.name: {"ours": [], "transformers": []} for q in QUESTIONS}
    with (
        local_server(["--dtype", dtype]) as target,
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as peer,
    ):
        assert peer.stdin is not None
        assert peer.stdout is not None
        peer.stdout.readline()
        for run in range(-1, runs):  # the first warms up
            for question in QUESTIONS:
                seconds = ours.answer(target, tokenizer, question, run)
                print(f"{question.name} {run}", file=peer.stdin, flush=True)
                theirs = float(peer.stdout.readline())
                if run >= 0:
                    results[question.name]["ours"].append(seconds)
                    results[question.name]["transformers"].append(theirs)
        peer.stdin.close()
    return results


def _print(results: dict[str, dict[str, list[float]]], ceilings: dict[str, float]) -> None:
    table = Table("question", "ours, tokens/s", "spread", "transformers, tokens/s", "ratio", "of the ceiling", box=None)
    for question in QUESTIONS:
        seconds, theirs = results[question.name]["ours"], results[question.name]["transformers"]
        rate = question.tokens / median(seconds)
        ceiling = ceilings.get(question.name)
        table.add_row(
            question.name,
            f"{rate:.0f}",
            f"{question.tokens / max(seconds):.0f} to {question.tokens / min(seconds):.0f}",
            f"{question.tokens / median(theirs):.0f}",
            f"{median(theirs) / median(seconds):.1f}",
            "" if ceiling is None else f"{rate / ceiling:.2f}",
        )
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
