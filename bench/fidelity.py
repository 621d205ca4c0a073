"""How near to the truth log probabilities are: the service's, over its port, beside rivals' and a float64 forward pass.

For each type everyone scores the same texts and completes their beginnings, greedily and sampled at temperature 1. Out
comes how far each logprob lies from what float64 makes of the same weights and tokens, in nats: tables and a JSON line.
Expected: bfloat16 weights cost nothing, since the truth has them too; rounding what they are multiplied by does.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from logprobs_server.__main__ import parse
from logprobs_server.models.progress import console_progress
from logprobs_server.models.resolve import resolve_model
from tokenizers import Tokenizer

from bench.deviation import Deviation, deviation
from bench.deviation_report import Found, report
from bench.exchange import Task, Told
from bench.figures import OURS
from bench.peers import RIVALS, Setting, command, is_installed
from bench.reference import Reference
from bench.subjects.llama_cpp import WHOLE
from bench.subjects.transformers_eager import FLOAT32_LOGITS
from bench.worker import started
from bench.workload import TOP

__all__ = ["TEXTS", "main", "make_tasks"]

TEXTS = tuple(Path(__file__).with_name("texts.txt").read_text("utf-8").removesuffix("\n").split("\n%\n"))
"""Prose, code, lists and tables, in several languages."""
_RIVALS = tuple(name for name in RIVALS if name != "OpenVINO")  # it takes other weights: float16
_DTYPES = ("float32", "bfloat16")
_PROMPT_TOKENS, _NEW_TOKENS = 32, 64


def main() -> None:
    """Runs what the command line asks for."""
    options = _options()
    folder = resolve_model(None, parse([], dict(os.environ)).cache_dir, console_progress(sys.stderr)).folder
    assert folder is not None
    tasks = make_tasks(Tokenizer.from_file(str(folder / "tokenizer.json")))
    options.peers_dir.mkdir(parents=True, exist_ok=True)
    threads = len(os.sched_getaffinity(0))
    found: dict[str, Found] = {}
    for dtype in options.dtype:
        setting = Setting(folder=folder, dtype=dtype, threads=threads, peers_dir=options.peers_dir)
        told = {name: _told(name, line, tasks) for name, line in _commands(setting, _wanted(options)).items()}
        reference = Reference(folder, getattr(torch, dtype))
        found[dtype] = {name: _deviations(answers, tasks, reference) for name, answers in told.items()}
    report(found, threads)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.fidelity", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dtype", nargs="+", choices=_DTYPES, default=_DTYPES)
    parser.add_argument("--rivals", nargs="*", choices=("all", *_RIVALS), help="unset: those that are installed")
    parser.add_argument("--peers-dir", type=Path, default=Path(".venv-peers"), help="where rivals are installed")
    return parser.parse_args()


def _wanted(options: argparse.Namespace) -> Sequence[str]:
    if options.rivals is None:
        return [name for name in _RIVALS if is_installed(RIVALS[name], options.peers_dir)]
    return _RIVALS if "all" in options.rivals else options.rivals


def _commands(setting: Setting, rivals: Iterable[str]) -> dict[str, list[str]]:
    """The programs to ask, by name: ours, rivals, and transformers once more with float32 logits where its are not."""
    commands = {OURS: [sys.executable, "-m", "bench.subjects.ours", "--dtype", setting.dtype]}
    for name in rivals:
        commands[name] = [*command(RIVALS[name], setting), *([WHOLE] if name == "llama.cpp" else [])]
        if name == "transformers" and setting.dtype != "float32":
            commands["transformers, float32 logits"] = [*commands[name], FLOAT32_LOGITS]
    return commands


def make_tasks(tokenizer: Tokenizer) -> dict[str, Task]:
    """What everyone is asked: texts one after the other, and their beginnings, all of one length, at once."""
    texts: list[list[int]] = [tokenizer.encode(text, add_special_tokens=False).ids for text in TEXTS]
    beginnings = [[text[:_PROMPT_TOKENS]] for text in texts]

    def task(prompts: list[list[list[int]]], new_tokens: int, temperature: float) -> Task:
        return Task(
            prompts=prompts,
            new_tokens=new_tokens,
            completions=1,
            temperature=temperature,
            choices=[],
            top=TOP,
            late=[],
        )

    return {
        "score": task([texts], 0, 0.0),
        "greedy": task(beginnings, _NEW_TOKENS, 0.0),
        "sampled": task(beginnings, _NEW_TOKENS, 1.0),
    }


def _told(name: str, line: Sequence[str], tasks: Mapping[str, Task]) -> dict[str, list[Told]]:
    """What one program answers, task by task; it runs alone."""
    can = RIVALS[name].kinds if name in RIVALS else None
    with started(line) as worker, worker.awake():
        asked = {key: task for key, task in tasks.items() if task.new_tokens or can is None or "score" in can}
        print(f"{name}: {', '.join(asked)}", file=sys.stderr)
        return {key: worker.ask(task).told for key, task in asked.items()}


def _deviations(
    answers: Mapping[str, Sequence[Told]], tasks: Mapping[str, Task], reference: Reference
) -> dict[str, Deviation]:
    """By task, of everything told."""
    return {key: deviation(_differences(told, tasks[key], reference)) for key, told in answers.items()}


def _differences(told: Sequence[Told], task: Task, reference: Reference) -> list[float]:
    """What was told less the truth about the same tokens."""
    differences: list[float] = []
    for prompt, tokens in zip((p for prompts in task.prompts for p in prompts), told, strict=True):
        new = [token_id for token_id, _ in tokens] if task.new_tokens else []
        truth = reference.logprobs(prompt + new)[-len(tokens) :]
        differences += [p - true for (_, p), true in zip(tokens, truth.tolist(), strict=True) if p is not None]
    return differences


if __name__ == "__main__":
    main()
