"""What the service does, shown once: starts a server, scores a sentence, streams and ranks twenty completions.

Talks to the server as any client would; `make demo` runs it.
"""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from logprobs import Client, GenerateStream, Generation
from logprobs.show import make_console, show_generation_live, show_ranking, show_score
from rich.console import Console

__all__ = ["local_server", "main"]

_SENTENCE = "The horse raced past the barn fell."
_PROMPT = "The capital of France is"
_SAMPLES = 20


def main() -> int:
    """Runs the demonstration; returns the exit status."""
    console = make_console()
    console.print("[bold]Starting the server[/] (python -m logprobs_server --port 0)")
    with local_server(sys.argv[1:]) as target, Client(target) as client:
        model = client.model().model
        console.print(f"[bold]{model.name}[/] in {model.dtype} on {target}\n")

        console.print(f'[bold]Score[/] "{_SENTENCE}", with the five most probable tokens at each position')
        show_score(console, client.score(_SENTENCE, top=5))

        console.print(f'\n[bold]Generate[/] {_SAMPLES} completions of "{_PROMPT}", seeds 1 to {_SAMPLES}')
        with client.generate(
            _PROMPT, completion_count=_SAMPLES, max_tokens=24, temperature=0.8, seed=1, stop=["\n"], top=2
        ) as stream:
            generation = show_generation_live(console, stream) if console.is_terminal else _print_live(console, stream)
        console.print("\n[bold]Ranked[/] by mean log probability per token")
        show_ranking(console, generation)
    console.print("\nThe server has stopped. `make serve` starts one that stays.")
    return 0


def _print_live(console: Console, stream: GenerateStream) -> Generation:
    """Where nothing can be redrawn: a line for each completion as soon as it ends."""
    for event in stream:
        if event.WhichOneof("event") == "finished":
            completion = next(c for c in stream.generation.completions if c.index == event.finished.completion)
            console.print(f"seed {completion.seed:>2} ended: {completion.text!r}", markup=False)
    return stream.collect()


@contextmanager
def local_server(arguments: Sequence[str]) -> Iterator[str]:
    """A server in a process of its own; gives its address, and stops it gracefully.

    Raises:
        SystemExit: it did not start; its own message says why.
    """
    command = [sys.executable, "-m", "logprobs_server", "--port", "0", "--log-level", "warning", *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()  # serving MODEL on HOST:PORT
            if not line:
                raise SystemExit(process.wait() or 1)
            yield line.split()[-1]
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait()
    if process.returncode != 0:
        raise SystemExit(process.returncode)


if __name__ == "__main__":
    sys.exit(main())
