"""From bytes that come in pieces to characters, and where each piece starts among them.

Knows nothing of tokens, vocabularies or stop strings: a piece is any run of bytes and may be cut anywhere.
"""

from __future__ import annotations

from codecs import getincrementaldecoder
from typing import NamedTuple

__all__ = ["Decoded", "Utf8Decoder"]

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_new_decoder = getincrementaldecoder("utf-8")


class Decoded(NamedTuple):
    """What one piece completed.

    start: code point offset of the piece's first byte; inside a character, that character's. An empty piece has no
        byte of its own to tell: it starts with the character that is incomplete, if one is.
    text: the characters that are complete now and were not before.
    byte_lengths: for each of them, the number of bytes it stands for.
    """

    start: int
    text: str
    byte_lengths: list[int]


class Utf8Decoder:
    """Decodes as `bytes.decode("utf-8", "replace")` would decode the whole, however it is cut."""

    def __init__(self) -> None:
        self._decoder = _new_decoder("replace")
        self._num_waiting = 0
        self._num_characters = 0

    def push(self, piece: bytes) -> Decoded:
        """Takes the next bytes; returns the characters they complete."""
        if not self._num_waiting and piece.isascii():
            decoded = Decoded(self._num_characters, piece.decode("ascii"), [1] * len(piece))
        else:
            decoded = self._general(piece)
        self._num_characters += len(decoded.text)
        return decoded

    def flush(self) -> Decoded:
        """Ends the bytes: a character that is still incomplete becomes U+FFFD."""
        text = self._decoder.decode(b"", final=True)
        decoded = Decoded(self._num_characters, text, [self._num_waiting] if text else [])
        self._num_waiting = 0
        self._num_characters += len(text)
        return decoded

    def _general(self, piece: bytes) -> Decoded:
        waited = self._num_waiting
        before = self._decoder.getstate()
        text = self._decoder.decode(piece)
        if _REPLACEMENT in text:
            self._decoder.setstate(before)
            text, lengths = self._byte_by_byte(piece)
        else:
            lengths = [_utf8_length(character) for character in text]
            self._num_waiting += len(piece) - sum(lengths)
        ended_before_piece = waited > 0 and lengths[:1] == [waited]
        return Decoded(self._num_characters + ended_before_piece, text, lengths)

    def _byte_by_byte(self, piece: bytes) -> tuple[str, list[int]]:
        """Decodes what holds U+FFFD, which may stand for one, two or three bytes."""
        texts: list[str] = []
        lengths: list[int] = []
        for value in piece:
            waited = self._num_waiting
            text = self._decoder.decode(bytes((value,)))
            self._num_waiting = len(self._decoder.getstate()[0])
            if len(text) == 2:  # what waited is no character, and neither is this byte the start of a longer one
                lengths.append(waited)
                waited = 0
            if text:
                lengths.append(waited + 1 - self._num_waiting)
                texts.append(text)
        return "".join(texts), lengths


def _utf8_length(character: str) -> int:
    point = ord(character)
    return 1 if point < 0x80 else 2 if point < 0x800 else 3 if point < 0x10000 else 4
