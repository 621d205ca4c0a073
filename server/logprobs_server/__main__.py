"""The server's command line: flags and environment become a Config. The only reader of the environment."""

from __future__ import annotations

import argparse
import asyncio
import importlib.util
import logging
import os
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from logprobs_server.config import Config
from logprobs_server.loop import EventLoop

__all__ = ["main", "parse"]

_TYPES: dict[str, type] = {"str": str, "int": int, "float": float}


def parse(arguments: Sequence[str] | None, environment: dict[str, str]) -> Config:
    """The configuration that flags and environment ask for; a bad one ends the program with a usage message."""
    parser = argparse.ArgumentParser(
        prog="logprobs-server", description="Serves token log probabilities of one model over gRPC."
    )
    for setting in fields(Config):
        if setting.metadata:
            default = setting.default
            name = f"--{setting.name.replace('_', '-')}"
            about = setting.metadata["about"] + ("" if default is None else f" (default: {default})")
            if setting.type == "bool":
                parser.add_argument(name, action=argparse.BooleanOptionalAction, default=default, help=about)
            else:
                kind = _TYPES[str(setting.type).removesuffix(" | None")]
                metavar = setting.name.rpartition("_")[2].upper()
                parser.add_argument(name, type=kind, default=default, metavar=metavar, help=about)
    flags = parser.parse_args(arguments)
    try:
        return Config(cache_dir=_cache_dir(environment), **vars(flags))
    except ValueError as error:
        parser.error(f"--{str(error).replace('_', '-', str(error).partition(':')[0].count('_'))}")


def _cache_dir(environment: dict[str, str]) -> Path:
    """Where converted models are kept: LOGPROBS_CACHE_DIR, or `logprobs` in the user's cache directory."""
    own = environment.get("LOGPROBS_CACHE_DIR")
    if own:
        return Path(own)
    return Path(environment.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "logprobs"


def main(arguments: Sequence[str] | None = None) -> int:
    """Serves until SIGTERM or SIGINT. Returns the exit status."""
    config = parse(arguments, dict(os.environ))
    if importlib.util.find_spec("torch") is None:
        print('logprobs-server: torch is missing: pip install "logprobs[server]"', file=sys.stderr)
        return 1
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")  # before grpc is imported
    logging.basicConfig(
        level=config.log_level.upper(), stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    from logprobs_server.app import serve

    with asyncio.Runner(loop_factory=EventLoop) as runner:
        return runner.run(serve(config))


if __name__ == "__main__":
    sys.exit(main())
