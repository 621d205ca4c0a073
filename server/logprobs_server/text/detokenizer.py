"""From bytes that come in pieces to characters, and where each piece starts among them.

Knows nothing of tokens, vocabularies or stop strings: a piece is any run of bytes and may be cut anywhere.
"""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["Decoded", "Utf8Decoder"]

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_INCOMPLETE = "unexpected end of data"
"""The reason Python gives when more bytes could make a character of the last ones."""


class Decoded(NamedTuple):
    """What one piece completed.

    start: code point offset of the piece's first byte; inside a character, that character's. An empty piece has no
        byte of its own to tell by: it starts with the character that is incomplete, if one is.
    text: the characters that are complete now and were not before.
    byte_lengths: for each of them, the number of bytes it stands for.
    """

    start: int
    text: str
    byte_lengths: list[int]


class Utf8Decoder:
    """Decodes as `bytes.decode("utf-8", "replace")` would decode the whole, however it is cut.

    Python's own incremental decoder is no base for this: it does not tell how many bytes a U+FFFD stands for, and
    keeps surrogates back that the whole already shows to be broken.
    """

    def __init__(self) -> None:
        self._waiting = b""  # the start of a character
        self._num_characters = 0

    def push(self, piece: bytes) -> Decoded:
        """Takes the next bytes; returns the characters they complete."""
        start = self._num_characters
        waited = len(self._waiting)
        if not waited and piece.isascii():
            text, lengths = piece.decode("ascii"), [1] * len(piece)
        else:
            text, lengths, self._waiting = _decode(self._waiting + piece)
        self._num_characters += len(text)
        if waited and lengths and lengths[0] == waited:
            start += 1  # what waited turned out to be broken, and this piece no part of it
        return Decoded(start, text, lengths)

    def flush(self) -> Decoded:
        """Ends the bytes: a character that is still incomplete becomes U+FFFD."""
        waiting, self._waiting = self._waiting, b""
        text, lengths = (_REPLACEMENT, [len(waiting)]) if waiting else ("", [])
        self._num_characters += len(text)
        return Decoded(self._num_characters - len(text), text, lengths)


def _decode(data: bytes) -> tuple[str, list[int], bytes]:
    """Characters, the bytes each stands for, and the bytes at the end that are the start of another."""
    text = ""
    lengths: list[int] = []
    while True:
        try:
            good = data.decode()
        except UnicodeDecodeError as error:
            good = data[: error.start].decode()
            text += good
            lengths += map(_utf8_length, good)
            if error.reason == _INCOMPLETE:
                return text, lengths, data[error.start :]
            text += _REPLACEMENT
            lengths.append(error.end - error.start)
            data = data[error.end :]
        else:
            return text + good, [*lengths, *map(_utf8_length, good)], b""


def _utf8_length(character: str) -> int:
    point = ord(character)
    return 1 if point < 0x80 else 2 if point < 0x800 else 3 if point < 0x10000 else 4
