"""Where the pieces of a given text start, in code points. Knows nothing of what the pieces are."""

from __future__ import annotations

from collections.abc import Iterable

from logprobs_server.text.detokenizer import Utf8Decoder

__all__ = ["code_point_offsets"]


def code_point_offsets(pieces: Iterable[bytes]) -> list[int]:
    """Offset of each piece's first byte in the decoded text; one inside a character has that character's.

    The same as `CompletionText` reports for the same pieces.
    """
    decoder = Utf8Decoder()
    return [decoder.push(piece).start for piece in pieces]
