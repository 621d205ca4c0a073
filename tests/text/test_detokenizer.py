"""Bytes that come in pieces decode as the whole does. Python's own decoder, given all of it, is the oracle."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from logprobs_server.text.detokenizer import Utf8Decoder
from logprobs_server.text.offsets import code_point_offsets
from text_oracles import REPLACEMENT, complete_characters, decode_whole

EURO = "€".encode()
GRIN = "😀".encode()
RAW = st.lists(
    st.sampled_from([0x61, 0x80, 0x9F, 0xA0, 0xBF, 0xC0, 0xC3, 0xE0, 0xE2, 0xED, 0xEF, 0xF0, 0xF4, 0xF5]), max_size=8
).map(bytes)
"""Bytes at the edges of UTF-8's rules: nearly all sequences of them are broken in some way."""
PIECES = st.lists(RAW | st.binary(max_size=6) | st.text(max_size=4).map(str.encode), max_size=8)
BROKEN = [
    pytest.param([b"\xe2\x82", b"a"], id="cut short by a letter"),
    pytest.param([b"\xe2\x82", EURO], id="cut short by another character"),
    pytest.param([b"\xed", b"\xa0\x80"], id="surrogate"),
    pytest.param([b"\xf0\x9f", b"\x98", b"\xff"], id="cut short in the third byte"),
    pytest.param([b"\xc0\xaf", b"\xf4\x90"], id="overlong and too large"),
    pytest.param([REPLACEMENT.encode(), b"\xef\xbf", b"\xbd"], id="a replacement character given"),
]


def decode_pieces(pieces: Sequence[bytes]) -> tuple[str, list[int]]:
    decoder = Utf8Decoder()
    parts = [*map(decoder.push, pieces), decoder.flush()]
    return "".join(part.text for part in parts), [length for part in parts for length in part.byte_lengths]


def split(data: bytes, lengths: Sequence[int]) -> list[bytes]:
    """Runs of bytes of these lengths, and what is left."""
    ends = [0, *accumulate(lengths), len(data)]
    return [data[start:end] for start, end in pairwise(ends)]


def offsets_in_whole(pieces: Sequence[bytes]) -> list[int]:
    """Characters that end before each piece's first byte or with it; empty pieces before a whole character only."""
    _, lengths = decode_whole(b"".join(pieces))
    ends = list(accumulate(lengths))
    starts = accumulate((len(piece) for piece in pieces), initial=0)
    return [sum(end <= start for end in ends) for start in list(starts)[:-1]]


@given(PIECES)
@example([b"\xe2", b"\x82", b"\xac"])
@example([b"\xed", b"\xa0\x80"])
@example(["\x7f\x80\u07ff\u0800\uffff\U00010000\U0010ffff".encode()])
def test_decoding_does_not_depend_on_how_bytes_are_cut(pieces: list[bytes]) -> None:
    text, lengths = decode_pieces(pieces)
    whole = b"".join(pieces)
    assert text == whole.decode("utf-8", "replace")
    assert [part.decode("utf-8", "replace") for part in split(whole, lengths)] == [*text, ""]


@pytest.mark.parametrize("pieces", BROKEN)
def test_broken_bytes_are_replaced_as_in_the_whole(pieces: list[bytes]) -> None:
    assert decode_pieces(pieces) == decode_whole(b"".join(pieces))


def test_a_character_comes_out_once_it_is_complete() -> None:
    decoder = Utf8Decoder()
    parts = [decoder.push(bytes([value])) for value in GRIN + b"!"]
    assert [(part.text, part.byte_lengths) for part in parts] == [("", []), ("", []), ("", []), ("😀", [4]), ("!", [1])]


@given(st.binary(max_size=6))
@example(b"\xed\xa0")
def test_just_what_may_still_become_a_character_waits(data: bytes) -> None:
    assert Utf8Decoder().push(data).text == complete_characters(data)


def test_flush_replaces_an_incomplete_character() -> None:
    decoder = Utf8Decoder()
    decoder.push(b"a" + EURO[:2])
    assert decoder.flush() == (1, REPLACEMENT, [2])
    assert decoder.flush() == (2, "", [])


@given(PIECES.map(lambda pieces: [piece for piece in pieces if piece]))
@example([b"\xe2", b"a"])
@example([b"\xe2\x82", b"\xac", b"a"])
def test_a_piece_starts_where_its_first_byte_is_in_the_whole(pieces: list[bytes]) -> None:
    assert code_point_offsets(pieces) == offsets_in_whole(pieces)


@given(PIECES)
@example([b"\xe2\x82", b"", b"a"])
def test_offsets_never_go_back(pieces: list[bytes]) -> None:
    offsets = code_point_offsets(pieces)
    assert offsets == sorted(offsets)


def test_a_piece_inside_a_character_has_that_characters_offset() -> None:
    assert code_point_offsets([b"a", GRIN[:1], GRIN[1:3], b"", GRIN[3:] + b"b", b"c"]) == [0, 1, 1, 1, 1, 3]


def test_no_pieces_have_no_offsets() -> None:
    assert code_point_offsets([]) == []
