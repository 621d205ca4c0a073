"""The command line client `logprobs`: arguments become calls, answers go to standard output. The only reader of the
environment. How answers look is for `show`, which alone needs rich; `--json` does without.

Exit status: 0 done, 1 the call failed, 2 wrong usage, 130 interrupted, 141 nobody reads the output any more.
"""

from __future__ import annotations

import os
import sys
from argparse import Namespace
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

from google.protobuf.json_format import MessageToJson
from google.protobuf.message import Message

from logprobs.arguments import parse
from logprobs.calls import GenerateStream
from logprobs.client import Client
from logprobs.errors import CallError, IncompleteStreamError, LogprobsError
from logprobs.generation import Generation
from logprobs.requests import GenerateOptions, ScoreOptions

__all__ = ["main"]

_FAILED, _USAGE, _INTERRUPTED, _NO_READER = 1, 2, 130, 141


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command. Returns the exit status."""
    try:
        status = _run(parse(arguments, dict(os.environ)))
        sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        return _INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else the interpreter's last flush complains
        return _NO_READER


def _run(args: Namespace) -> int:
    try:
        show = None if args.json else _load_show()
        _read_standard_input(args)
        with Client(args.target, timeout=args.timeout) as client:
            _COMMANDS[args.command](client, args, show)
    except ValueError as error:  # InvalidTextError among them: nothing was sent
        return _complain(str(error), _USAGE)
    except LogprobsError as error:
        return _complain(_told(error), _FAILED)
    return 0


def _load_show() -> ModuleType:
    try:
        from logprobs import show
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != "rich":
            raise
        raise ValueError('rich is missing: pip install "logprobs[cli]", or use --json') from None
    return show


def _read_standard_input(args: Namespace) -> None:
    """Replaces the text "-" by what standard input holds, as it is."""
    if args.text == "-":
        args.text = sys.stdin.buffer.read().decode("utf-8")


def _score(client: Client, args: Namespace, show: Any) -> None:
    response = client.score(args.text, args.continuations, **_options(args, ScoreOptions))
    _tell(response, show and show.show_score)


def _generate(client: Client, args: Namespace, show: Any) -> None:
    prompt = [{"role": "user", "content": args.text}] if args.chat else args.text
    with client.generate(prompt, **_options(args, GenerateOptions)) as stream:
        if show is None:
            _print_events(stream)
        else:
            console = show.make_console()
            _show_details(show, console, args, show.show_generation_live(console, stream))


def _print_events(stream: GenerateStream) -> None:
    for event in stream:
        print(_json(event), flush=True)


def _show_details(show: Any, console: Any, args: Namespace, generation: Generation) -> None:
    if generation.prompt_tokens:
        show.show_tokens(console, generation.prompt_tokens)
    if generation.ranking is not None:
        show.show_ranking(console, generation)
    if args.top or args.token_ids or args.entropy:
        for completion in generation.ranked:
            show.show_tokens(console, completion.tokens)


def _tokenize(client: Client, args: Namespace, show: Any) -> None:
    _tell(client.tokenize(args.text), show and show.show_tokenized)


def _model(client: Client, args: Namespace, show: Any) -> None:
    _tell(client.model(), show and show.show_model)


_COMMANDS: dict[str, Callable[[Client, Namespace, Any], None]] = {
    "score": _score,
    "generate": _generate,
    "tokenize": _tokenize,
    "model": _model,
}


def _options(args: Namespace, kind: Any) -> Any:
    """The arguments that are options of a request."""
    return {name: getattr(args, name) for name in kind.__annotations__ if hasattr(args, name)}


def _tell(response: Message, show: Callable[[Any, Any], None] | None) -> None:
    if show is None:
        print(_json(response))
    else:
        from logprobs.show import make_console

        show(make_console(), response)


def _json(message: Message) -> str:
    return MessageToJson(message, indent=None)


def _told(error: LogprobsError) -> str:
    """The error, then the rules that the request breaks, one a line."""
    cause = error.cause if isinstance(error, IncompleteStreamError) else error
    violations = cause.violations if isinstance(cause, CallError) else ()
    return "\n".join([str(error), *(f"  {field}: {description}" for field, description in violations)])


def _complain(message: str, status: int) -> int:
    print(f"logprobs: {message}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
