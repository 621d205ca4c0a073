"""Random texts of every kind of character, and random token ids, the same ones every time."""

from __future__ import annotations

import random
from collections.abc import Iterator

__all__ = ["random_ids", "random_texts"]

_SNIPPETS = (
    " ",
    "  ",
    "\n",
    "\t",
    "\r\n",
    "the ",
    " horse",
    "2024",
    "é",
    "e\u0301",
    "字",
    "🙂",
    "👩‍👩‍👧",
    "\u00ad",
    "\ufeff",
    "▁",
    "ＡＢ",
    "İ",
)
_RANGES = ((0, 0x7F), (0x80, 0x7FF), (0x800, 0xD7FF), (0xE000, 0xFFFF), (0x10000, 0x10FFFF))


def random_ids(count: int, size: int, seed: int = 1) -> list[list[int]]:
    """Sequences of up to 20 ids below `size`."""
    draw = random.Random(seed)
    return [[draw.randrange(size) for _ in range(draw.randrange(21))] for _ in range(count)]


def random_texts(count: int, seed: int = 0) -> Iterator[str]:
    """Texts of up to 24 snippets and characters, from all of Unicode but its surrogates."""
    draw = random.Random(seed)
    for _ in range(count):
        yield "".join(_piece(draw) for _ in range(draw.randrange(25)))


def _piece(draw: random.Random) -> str:
    return draw.choice(_SNIPPETS) if draw.random() < 0.5 else chr(draw.randint(*draw.choice(_RANGES)))
