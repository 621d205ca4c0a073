"""Slow, obvious answers about a whole text, to compare incremental ones with."""

from __future__ import annotations

from collections.abc import Sequence

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
INCOMPLETE = {
    chr(point).encode()[:length]
    for point in range(0x80, 0x110000, 0x40)
    if not 0xD800 <= point < 0xE000
    for length in range(1, len(chr(point).encode()))
}
"""Every start of a character that is not a whole one; the last byte of a character takes 64 values."""


def decode_whole(data: bytes) -> tuple[str, list[int]]:
    """Characters and the number of bytes each stands for, found one error at a time."""
    text, lengths = "", []
    while data:
        try:
            good, bad = data.decode(), 0
        except UnicodeDecodeError as error:
            good, bad = data[: error.start].decode(), error.end - error.start
        text += good + (REPLACEMENT if bad else "")
        lengths += [len(character.encode()) for character in good] + ([bad] if bad else [])
        data = data[len(good.encode()) + bad :]
    return text, lengths


def complete_characters(data: bytes) -> str:
    """The text of `data` without a last character that more bytes could complete."""
    waiting = next((data[-count:] for count in (3, 2, 1) if data[-count:] in INCOMPLETE), b"")
    return data.removesuffix(waiting).decode("utf-8", "replace")


def first_stop(text: str, stops: Sequence[str]) -> str | None:
    """The match that ends first, and of those that end together the longest."""
    for end in range(1, len(text) + 1):
        matches = [stop for stop in stops if text[:end].endswith(stop)]
        if matches:
            return max(matches, key=len)
    return None


def cut_at_first_stop(text: str, stops: Sequence[str]) -> str:
    """The text before the first match."""
    for end in range(1, len(text) + 1):
        matches = [stop for stop in stops if text[:end].endswith(stop)]
        if matches:
            return text[: end - max(map(len, matches))]
    return text
