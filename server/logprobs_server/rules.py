"""Collects the rules that a request breaks, and notes those that hold for requests of every kind.

Knows no fields by name: what each must be is with what reads it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from google.protobuf.message import Message
from google.protobuf.unknown_fields import UnknownFieldSet

from logprobs_server.errors import MAX_VIOLATIONS, InvalidRequestError, Violation

__all__ = ["Rules", "check_id", "check_ids", "unknown_parts"]


class Rules:
    """Collects the first rules that a request breaks, and counts the others."""

    def __init__(self) -> None:
        self._violations: list[Violation] = []
        self.num_broken = 0

    def broken(self, field: str, description: str) -> None:
        """One more broken rule."""
        self.num_broken += 1
        if len(self._violations) < MAX_VIOLATIONS:
            self._violations.append(Violation(field, description))

    def check(self, holds: bool, field: str, description: str) -> bool:
        """Notes the rule as broken unless it holds; returns whether it does."""
        if not holds:
            self.broken(field, description)
        return holds

    def adopt(self, path: str, error: InvalidRequestError) -> None:
        """Takes over the rules that a part of the request breaks; `path` leads to the part, its dot included."""
        for violation in error.violations:
            self.broken(f"{path}{violation.field}", violation.description)
        self.num_broken += error.num_unlisted

    def done(self) -> None:
        """Ends the checks.

        Raises:
            InvalidRequestError: rules were broken.
        """
        if self.num_broken:
            raise self.error()

    def error(self) -> InvalidRequestError:
        """What tells of the broken rules."""
        return InvalidRequestError(self._violations, self.num_broken - len(self._violations))


def check_id(rules: Rules, field: str, token_id: int, vocabulary_size: int) -> None:
    """Notes an id outside the vocabulary."""
    if not 0 <= token_id < vocabulary_size:
        rules.broken(field, f"{token_id} is outside the vocabulary, [0, {vocabulary_size - 1}]")


def check_ids(rules: Rules, field: str, ids: Sequence[int], vocabulary_size: int) -> None:
    """Notes every id outside the vocabulary."""
    for i, token_id in enumerate(ids):
        check_id(rules, f"{field}[{i}]", token_id, vocabulary_size)


def unknown_parts(message: Message, path: str = "") -> Iterator[Violation]:
    """Fields and enum values, at any depth, that the contract compiled in here does not have."""
    for unknown in UnknownFieldSet(message):  # type: ignore[attr-defined]
        yield Violation(f"{path}{unknown.field_number}", "a field with this number is not known to this server")
    for field, value in message.ListFields():
        name = f"{path}{field.name}"
        if field.message_type is not None:
            if field.message_type.GetOptions().map_entry:
                continue  # the contract's maps hold scalars
            for place, inner in _places(name, value, field.is_repeated):
                yield from unknown_parts(inner, f"{place}.")
        elif field.enum_type is not None:
            for place, number in _places(name, value, field.is_repeated):
                if number not in field.enum_type.values_by_number:
                    yield Violation(place, f"{number} is no value of {field.enum_type.name} known to this server")


def _places(name: str, value: Any, repeated: bool) -> list[tuple[str, Any]]:
    return [(f"{name}[{i}]", item) for i, item in enumerate(value)] if repeated else [(name, value)]
