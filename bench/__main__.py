"""Asks the service, over its port, and rivals the same questions, in turn; prints a table and one JSON line.

All run on the embedded model with five alternatives for every token. Whoever is not asked is stopped meanwhile.
Expected ceilings: a step reads all weights, and the keys and values of its streams, once; a scored token takes the
products of the layers and of the head. Compare ratios of one run, not times of several.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from fnmatch import fnmatch
from functools import reduce
from pathlib import Path

from logprobs_server.__main__ import parse
from logprobs_server.models.progress import console_progress
from logprobs_server.models.resolve import resolve_model
from tokenizers import Tokenizer

from bench.figures import OURS, START
from bench.machine import Machine
from bench.peers import RIVALS, Setting, command
from bench.report import report
from bench.summary import measures
from bench.worker import Worker, started
from bench.workload import QUESTIONS, Question, make_task, warm_up

__all__ = ["main"]

Results = dict[str, dict[str, list[dict[str, float]]]]


def main() -> None:
    """Runs what the command line asks for."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # nobody who is stopped must stay behind
    options, questions = _options()
    folder = resolve_model(None, parse([], dict(os.environ)).cache_dir, console_progress(sys.stderr)).folder
    assert folder is not None
    setting = Setting(
        folder=folder, dtype=options.dtype, threads=len(os.sched_getaffinity(0)), peers_dir=options.peers_dir
    )
    setting.peers_dir.mkdir(parents=True, exist_ok=True)
    with _commands(setting, RIVALS if "all" in options.rivals else options.rivals, questions) as commands:
        with started(commands[OURS]):
            pass  # builds the kernels if need be, so that no start that counts does
        results: Results = defaultdict(lambda: defaultdict(list))
        machines = [_run(run, questions, commands, setting, results) for run in range(options.runs)]
    report(results, reduce(Machine.best, machines, _machine(setting)), options.picture)


def _options() -> tuple[argparse.Namespace, list[Question]]:
    """The command line, and the questions that it names."""
    parser = argparse.ArgumentParser(
        prog="python -m bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    keys = " ".join(question.key for question in QUESTIONS)
    parser.add_argument("--only", nargs="+", default=["*"], metavar="PATTERN", help=f"questions, of: {keys}")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--runs", type=int, default=3, help="times that everyone is started and asked everything")
    parser.add_argument("--rivals", nargs="*", choices=("all", *RIVALS), default=["transformers"])
    parser.add_argument("--peers-dir", type=Path, default=Path(".venv-peers"), help="where rivals are installed")
    parser.add_argument("--picture", type=Path, help="an .svg or .png file to draw")
    options = parser.parse_args()
    questions = [q for q in QUESTIONS if any(fnmatch(q.key, pattern) for pattern in options.only)]
    if not questions:
        parser.error(f"--only: {' '.join(options.only)} is none of {keys}")
    if options.runs < 1:
        parser.error(f"--runs: {options.runs} is below 1")
    return options, questions


@contextmanager
def _commands(setting: Setting, rivals: Iterable[str], questions: Sequence[Question]) -> Iterator[dict[str, list[str]]]:
    """The programs to ask, by name: ours, the parts of it that questions are about, rivals."""
    python = [sys.executable, "-m"]
    ours = [*python, "bench.subjects.ours", "--dtype", setting.dtype]
    commands = {OURS: ours} | {name: command(RIVALS[name], setting) for name in rivals}
    wanted = {question.of for question in questions}
    if "engine" in wanted:
        commands["engine"] = [*python, "bench.subjects.engine", "--dtype", setting.dtype]
    with tempfile.TemporaryDirectory() as wide:
        if "wide" in wanted:
            _output([*python, "bench.wide_model", str(setting.folder / "tokenizer.json"), wide])
            commands["wide"] = [*ours, "--model", wide]
        yield commands


def _run(
    run: int, questions: Sequence[Question], commands: dict[str, list[str]], setting: Setting, results: Results
) -> Machine:
    """Starts everyone, and asks them every question in turn, each run in another order; returns the machine's ceilings
    just before."""
    tokenizer = Tokenizer.from_file(str(setting.folder / "tokenizer.json"))
    with ExitStack() as stack:
        workers: dict[str, Worker] = {}
        for name, line in commands.items():
            worker = workers[name] = stack.enter_context(started(line))
            if name == OURS or name in RIVALS:
                results[name][START].append({"seconds": worker.ready_s, "mib": worker.idle_mib})
        machine = _machine(setting)
        results[OURS][START][-1] |= machine.ceilings
        for question in questions:
            names = [name for name in workers if _answers(name, question)]
            turn = run % len(names)
            for name in names[turn:] + names[:turn]:
                found = _asked(workers[name], question, tokenizer, run)
                print(f"run {run} · {question.name} · {name}: {found['tokens_s']:.0f} tokens/s", file=sys.stderr)
                results[OURS if question.of else name][question.key].append(found)
        return machine


def _answers(name: str, question: Question) -> bool:
    """Whether someone is asked, and can do, what the question wants."""
    if name in RIVALS:
        return question.of is None and question.kind in RIVALS[name].kinds
    return name == (question.of or OURS)


def _asked(worker: Worker, question: Question, tokenizer: Tokenizer, run: int) -> dict[str, float]:
    """What a question's answer shows, how much memory it took, and how many cores were busy with something else."""
    with worker.awake():
        if question.warm:
            seed = run if question.warm == "same" else ("warm-up", run)
            worker.ask(make_task(warm_up(question), tokenizer, seed))
        task, before_mib = make_task(question, tokenizer, run), worker.reset_peak()
        foreign_s = worker.foreign_s()
        found = measures(worker.ask(task), question.tokens, question.completions)
        foreign = max(0.0, worker.foreign_s() - foreign_s) / found["seconds"]
        peak_mib = worker.peak_mib()
    return {**found, "mib": peak_mib, "grown_mib": peak_mib - before_mib, "foreign_cores": foreign}


def _machine(setting: Setting) -> Machine:
    """The machine's ceilings, measured now."""
    line = [sys.executable, "-m", "bench.machine", str(setting.folder), setting.dtype]
    return Machine(**json.loads(_output(line)))


def _output(line: list[str]) -> str:
    return subprocess.check_output(line, text=True, cwd=Path(__file__).parent.parent)


if __name__ == "__main__":
    main()
