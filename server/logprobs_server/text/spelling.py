"""The exact bytes that entries of a vocabulary stand for, read from a tokenizer's serialised form.

Plain JSON in, bytes out. Knows nothing of token ids or of how a text is cut into tokens.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

__all__ = ["Json", "Spell", "UnsupportedTokenizerError", "speller", "starts_without_space"]

Spell = Callable[[str], bytes]
Json = Mapping[str, Any]

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_CHILDREN = ("normalizers", "pretokenizers", "decoders")
_PIECEWISE = {"ByteFallback", "Metaspace", "Replace", "Strip"}
"""Decoders that treat every piece by itself, once those that join pieces are set aside."""


class UnsupportedTokenizerError(ValueError):
    """The exact bytes of this tokenizer's tokens cannot be known; the message says why."""


def speller(tokenizer: Json) -> Spell:
    """How to spell the entries of the model's vocabulary; added tokens are not among them.

    Raises:
        UnsupportedTokenizerError: the decoder is of a kind whose effect on one token is not known.
    """
    decoders = list(_parts(tokenizer["decoder"]))
    kinds = [part["type"] for part in decoders if part["type"] != "Fuse"]
    if kinds == ["ByteLevel"] or (not decoders and _is_byte_level(tokenizer)):
        return _spell_byte_level
    if kinds == ["WordPiece"]:
        return _word_piece_speller(decoders[0]["prefix"])
    if not decoders:
        raise UnsupportedTokenizerError("the tokenizer has no decoder")
    if not set(kinds) <= _PIECEWISE:
        raise UnsupportedTokenizerError(f"the tokenizer's decoder is not supported: {', '.join(kinds)}")
    return _piecewise_speller(decoders, tokenizer["model"])


def starts_without_space(tokenizer: Json, spell: Spell) -> tuple[str, ...] | None:
    """The starts of a text before which the tokenizer adds no space: none of them if it always does.

    Returns:
        None if it never adds one.
    """
    if any(part["type"] == "Prepend" and spell(part["prepend"]) == b" " for part in _parts(tokenizer["normalizer"])):
        return ()
    if any(part["type"] == "WordPiece" for part in _parts(tokenizer["decoder"])):
        return ()
    for part in _parts(tokenizer["pre_tokenizer"]):
        if part["type"] == "Metaspace" and part["prepend_scheme"] != "never":
            return (" ", part["replacement"])
        if part["type"] == "ByteLevel" and part["add_prefix_space"]:
            return (" ",)
    return None


def _parts(component: Json | None) -> Iterator[Json]:
    """The parts of a normaliser, pre-tokenizer or decoder; sequences, nested ones too, are taken apart."""
    if component is None:
        return
    if component["type"] != "Sequence":
        yield component
        return
    for name in _CHILDREN:
        for child in component.get(name, ()):
            yield from _parts(child)


def _is_byte_level(tokenizer: Json) -> bool:
    before = (*_parts(tokenizer["normalizer"]), *_parts(tokenizer["pre_tokenizer"]))
    return any(part["type"] == "ByteLevel" for part in before)


def _byte_of_character() -> dict[str, int]:
    """What each character of the byte-level alphabet stands for.

    Printable bytes of Latin-1 are their own characters; the others, in order, are those from U+0100 on.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = sorted(set(range(0x100)) - set(printable))
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


_BYTES = _byte_of_character()


def _spell_byte_level(piece: str) -> bytes:
    """Entries with a character outside the alphabet are as they are spelled."""
    try:
        return bytes(map(_BYTES.__getitem__, piece))
    except KeyError:
        return piece.encode()


def _word_piece_speller(prefix: str) -> Spell:
    def spell(piece: str) -> bytes:
        return (piece.removeprefix(prefix) if piece.startswith(prefix) else f" {piece}").encode()

    return spell


def _piecewise_speller(decoders: list[Json], model: Json) -> Spell:
    kinds = [part["type"] for part in decoders]
    if "Strip" in kinds and "Fuse" not in kinds[: kinds.index("Strip")]:
        raise UnsupportedTokenizerError("the tokenizer's decoder strips every token")
    replacements = [_replacement(part) for part in decoders if part["type"] in ("Metaspace", "Replace")]
    has_bytes = "ByteFallback" in kinds or model.get("byte_fallback", False)

    def spell(piece: str) -> bytes:
        if has_bytes and (match := _BYTE.fullmatch(piece)):
            return bytes.fromhex(match[1])
        for old, new in replacements:
            piece = piece.replace(old, new)
        return piece.encode()

    return spell


def _replacement(part: Json) -> tuple[str, str]:
    if part["type"] == "Metaspace":
        return part["replacement"], " "
    if "String" not in part["pattern"]:
        raise UnsupportedTokenizerError("the tokenizer's decoder replaces a regular expression")
    return part["pattern"]["String"], part["content"]
