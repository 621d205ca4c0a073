"""A subject's process as the benchmark sees it: asked by lines, stopped while others are asked, its memory watched.

Reads /proc, and so needs Linux.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import psutil

from bench.exchange import Answer, Task

__all__ = ["Worker", "started"]

_ENVIRONMENT = {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "GRPC_VERBOSITY": "ERROR"}
"""Of every subject."""
_ROOT = Path(__file__).parent.parent
_PEAK_RESET = "5"
"""What proc(5) wants written to clear_refs."""
_SETTLE_S = 1.0
_LOG_LINES = 20


class Worker:
    """A subject that has started. It is stopped as a whole, and so takes no time, unless it is awake.

    ready_s: seconds until it could take requests. idle_mib: resident memory a second later.
    """

    def __init__(self, process: subprocess.Popen[str], command: Sequence[str], started_at: float) -> None:
        self._process = process
        self._command = " ".join(command)
        ready_s: float | None = json.loads(self._line())["ready_s"]
        self.ready_s = time.perf_counter() - started_at if ready_s is None else ready_s
        time.sleep(_SETTLE_S)
        self.idle_mib = self._status_mib("VmRSS")
        self._each("suspend")

    @contextmanager
    def awake(self) -> Iterator[None]:
        """Lets it run for a while."""
        self._each("resume")
        try:
            yield
        finally:
            self._each("suspend")

    def ask(self, task: Task) -> Answer:
        """Has it do the task."""
        assert self._process.stdin is not None
        print(json.dumps(asdict(task)), file=self._process.stdin, flush=True)
        return Answer.from_json(json.loads(self._line()))

    def reset_peak(self) -> float:
        """Lets `peak_mib` start anew, at what it returns."""
        for process in self._tree():
            Path(f"/proc/{process.pid}/clear_refs").write_text(_PEAK_RESET)
        return self._status_mib("VmRSS")

    def peak_mib(self) -> float:
        """Most resident memory since the last reset, summed over its processes."""
        return self._status_mib("VmHWM")

    def foreign_s(self) -> float:
        """Seconds that cores were busy since the machine's start, without what this subject and its client used."""
        machine = psutil.cpu_times()
        client = psutil.Process(self._process.pid)
        used = [process.cpu_times() for process in (client, *client.children(recursive=True))]
        return sum(machine) - machine.idle - machine.iowait - sum(each.user + each.system for each in used)

    def stop(self) -> None:
        """Ends it as it would end by itself."""
        self._each("resume")
        self._process.communicate()

    def _line(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"{self._command} ended with status {self._process.wait()}")
        return line

    def _tree(self) -> list[psutil.Process]:
        """A server and what it started, without the client that asks it; the process itself if it asks nobody."""
        client = psutil.Process(self._process.pid)
        return client.children(recursive=True) or [client]

    def _each(self, action: str) -> None:
        for process in self._tree():
            getattr(process, action)()

    def _status_mib(self, name: str) -> float:
        pattern = re.compile(rf"^{name}:\s+(\d+) kB$", re.MULTILINE)
        statuses = [Path(f"/proc/{process.pid}/status").read_text() for process in self._tree()]
        return sum(int(found[1]) for status in statuses if (found := pattern.search(status))) / 1024


@contextmanager
def started(command: Sequence[str]) -> Iterator[Worker]:
    """A subject's program, until the context ends; shows the end of what it logged if it fails."""
    with tempfile.TemporaryFile("w+") as log:
        start = time.perf_counter()
        process = subprocess.Popen(
            command,
            cwd=_ROOT,
            env={**os.environ, **_ENVIRONMENT},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        )
        try:
            worker = Worker(process, command, start)
            yield worker
            worker.stop()
        finally:
            if process.poll():
                log.seek(0)
                print("".join(log.readlines()[-_LOG_LINES:]), end="")
            _kill(process)


def _kill(process: subprocess.Popen[str]) -> None:
    """Ends a process and what it started, stopped or not."""
    if process.poll() is None:
        for each in psutil.Process(process.pid).children(recursive=True):
            each.kill()
        process.kill()
    process.wait()
