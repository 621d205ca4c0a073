"""The arguments of the command line client. Knows which there are, not what they do; names are those of requests."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Mapping, Sequence
from typing import get_args

from logprobs.requests import EarlyStopping, RankedBy

__all__ = ["parse"]

_DEFAULT_TARGET = "127.0.0.1:50051"
_GENERATE_NUMBERS: dict[str, type] = {
    "max_tokens": int,
    "best_of": int,
    "temperature": float,
    "top_k": int,
    "top_p": float,
    "min_p": float,
    "typical_p": float,
    "repetition_penalty": float,
    "presence_penalty": float,
    "frequency_penalty": float,
    "seed": int,
    "beam_count": int,
    "length_penalty": float,
    "min_tokens": int,
    "time_limit": float,
    "length_exponent": float,
}


def parse(arguments: Sequence[str] | None, environment: Mapping[str, str]) -> Namespace:
    """The arguments; wrong ones end the program with a usage message and status 2."""
    parser = ArgumentParser(
        prog="logprobs", description="Token log probabilities, from a Logprobs server.", allow_abbrev=False
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    shared = _shared(environment)
    for name, (about, add) in _COMMANDS.items():
        add(commands.add_parser(name, help=about, description=f"{about}.", parents=[shared], allow_abbrev=False))
    return parser.parse_args(arguments)


def _shared(environment: Mapping[str, str]) -> ArgumentParser:
    shared = ArgumentParser(add_help=False)
    shared.add_argument(
        "--target",
        default=environment.get("LOGPROBS_TARGET", _DEFAULT_TARGET),
        metavar="HOST:PORT",
        help="the server (default: LOGPROBS_TARGET, else %(default)s)",
    )
    shared.add_argument("--timeout", type=float, metavar="SECONDS", help="give up after this time (default: never)")
    shared.add_argument("--json", action="store_true", help="print the messages themselves, one a line")
    return shared


def _add_score(parser: ArgumentParser) -> None:
    _add_text(parser, "what to score, or the context of what to score")
    parser.add_argument("continuations", nargs="*", metavar="CONTINUATION", help="score these, given the text")
    _add_logprobs(parser)
    parser.add_argument("--neutral-context", metavar="TEXT", help="also score them after this text, for their pmi")
    parser.add_argument("--long-input", choices=("refuse", "roll"), help="what to do beyond the context window")
    parser.add_argument("--roll-stride", type=int, metavar="N", help="new tokens per window of a rolled input")
    parser.add_argument("--totals-only", action="store_true", help="do not tell tokens")
    parser.add_argument("--next-token", action="store_true", help="also tell which token would come next")


def _add_generate(parser: ArgumentParser) -> None:
    _add_text(parser, "the prompt")
    parser.add_argument("--chat", action="store_true", help="the prompt is a user's message in a conversation")
    parser.add_argument("-n", "--completion-count", type=int, metavar="N", help="how many completions to return")
    for name, kind in _GENERATE_NUMBERS.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind, metavar="N" if kind is int else "X")
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT", help="a text that ends a completion")
    parser.add_argument("--stop-token-id", action="append", default=[], type=int, dest="stop_token_ids", metavar="ID")
    parser.add_argument("--include-stop", action="store_true", help="keep what stopped a completion in its text")
    parser.add_argument("--ignore-eos", action="store_true", help="go on after end-of-sequence tokens")
    parser.add_argument("--early-stopping", choices=get_args(EarlyStopping), help="when a beam search ends")
    parser.add_argument("--criterion", choices=get_args(RankedBy), help="what completions are ranked by")
    parser.add_argument("--prompt-logprobs", action="store_true", help="also tell the prompt's tokens")
    _add_logprobs(parser)


def _add_tokenize(parser: ArgumentParser) -> None:
    _add_text(parser, "what to turn into tokens")


def _add_model(parser: ArgumentParser) -> None:
    parser.set_defaults(text="")


def _add_text(parser: ArgumentParser, about: str) -> None:
    parser.add_argument("text", metavar="TEXT", help=f'{about}; "-" reads standard input, last line end included')


def _add_logprobs(parser: ArgumentParser) -> None:
    parser.add_argument("--top", type=int, metavar="K", help="also tell the K most probable tokens at each position")
    parser.add_argument(
        "--token-id",
        action="append",
        default=[],
        type=int,
        dest="token_ids",
        metavar="ID",
        help="also tell this token at each position",
    )
    parser.add_argument("--entropy", action="store_true", help="also tell each position's entropy")


_COMMANDS = {
    "score": ("Scores a text token by token, or continuations of it", _add_score),
    "generate": ("Generates completions of a prompt, shown as they grow, and ranks them", _add_generate),
    "tokenize": ("Turns a text into tokens", _add_tokenize),
    "model": ("Tells which model is served, its limits and defaults", _add_model),
}
