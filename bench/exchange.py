"""What the benchmark asks of a subject and what it is told, as JSON. Plain data: rivals' environments hold no more."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

__all__ = ["LATE_AFTER", "LATE_NEW_TOKENS", "Answer", "Stream", "Task", "Told"]

LATE_AFTER = 192
"""Messages that every stream has seen when the late prompt comes in; of fewer than 100, p99 is the longest gap."""
LATE_NEW_TOKENS = 8
"""Tokens generated after the late prompt."""

Told: TypeAlias = list[tuple[int, float | None]]
"""Ids of tokens and their log probabilities, in the order they were told; None where a subject leaves one out."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """Work for one subject, all clients at once.

    prompts: token ids, of every client those that it asks one after the other.
    new_tokens: generated per completion; 0 scores the prompts, or the choices that follow them.
    completions: drawn per prompt. temperature: 0 takes the best token.
    top: alternatives per token.
    late: a prompt that comes in while the others decode; none if empty.
    """

    prompts: list[list[list[int]]]
    new_tokens: int
    completions: int
    temperature: float
    choices: list[list[int]]
    top: int
    late: list[int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Stream:
    """When one request was sent, when tokens arrived, in seconds of one clock, and how many each time."""

    start: float
    times: list[float]
    counts: list[int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """How a task went: seconds from the first request to the last token, and the streams of what was generated.

    told: what was generated or scored, of every request, clients and their requests in order.
    """

    seconds: float
    streams: list[Stream]
    told: list[Told]
    late: Stream | None = None

    @classmethod
    def from_json(cls, value: Any) -> Answer:
        """What `dataclasses.asdict` made of an answer."""
        late = value["late"]
        return cls(
            seconds=value["seconds"],
            streams=[Stream(**stream) for stream in value["streams"]],
            told=[[(token_id, logprob) for token_id, logprob in told] for told in value["told"]],
            late=late and Stream(**late),
        )
