"""Tokens, text and offsets of a completion agree, whatever stops it. The oracle looks at the whole completion."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from logprobs_server.text.completion import CompletionText, Delta, PlacedToken
from logprobs_server.text.offsets import code_point_offsets
from text_oracles import REPLACEMENT, complete_characters, cut_at_first_stop, decode_whole, first_stop

GRIN = "😀".encode()
ALPHABET = "ab€😀"
TOKENS = st.lists(
    st.text(ALPHABET, max_size=3).map(str.encode)
    | st.sampled_from([b"", b"\xe2", b"\x82", b"\xac", b"\xf0\x9f", b"\x98\x80", b"\xff"]),
    max_size=8,
)
STOPS = st.lists(st.text(ALPHABET + REPLACEMENT, min_size=1, max_size=4), max_size=3)


def complete(
    tokens: Sequence[bytes], stops: Sequence[str], include: bool = False, unmatched: int = 0
) -> tuple[list[Delta], CompletionText]:
    """All deltas of a completion that ends with its tokens, if no stop string ends it before."""
    text = CompletionText(stops, include)
    deltas: list[Delta] = []
    for index, token in enumerate(tokens):
        deltas.append(text.push(token, match_stops=index >= unmatched))
        if deltas[-1].stop is not None:
            return deltas, text
    return [*deltas, text.flush()], text


def text_of(deltas: Sequence[Delta]) -> str:
    return "".join(delta.text for delta in deltas)


def placed(deltas: Sequence[Delta]) -> list[PlacedToken]:
    return [token for delta in deltas for token in delta.placed]


def drawn_until_stop(tokens: Sequence[bytes], stops: Sequence[str]) -> Sequence[bytes]:
    """The tokens up to the one that completes the first stop string."""
    for count in range(1, len(tokens) + 1):
        if first_stop(complete_characters(b"".join(tokens[:count])), stops) is not None:
            return tokens[:count]
    return tokens


def expected(tokens: Sequence[bytes], stops: Sequence[str], include: bool) -> tuple[list[PlacedToken], str, str | None]:
    """The tokens, text and stop of a completion, from all its bytes at once."""
    drawn = drawn_until_stop(tokens, stops)
    text, lengths = decode_whole(b"".join(drawn))
    stop = first_stop(complete_characters(b"".join(drawn)), stops)
    end = len(text)
    if stop is not None:
        end = len(cut_at_first_stop(text, stops)) + (len(stop) if include else 0)
    end_bytes = sum(lengths[:end])
    result, start = [], 0
    for token, offset in zip(drawn, code_point_offsets(drawn), strict=True):
        kept = token[: max(end_bytes - start, 0)]
        result.append(
            PlacedToken(
                bytes=kept,
                byte_offset=min(start, end_bytes),
                code_point_offset=min(offset, end),
                trimmed=kept != token,
            )
        )
        start += len(token)
    return result, text[:end], stop


@given(TOKENS, STOPS, st.booleans())
@example([b"a", b"b"], ["ab"], False)
@example([b"xa", b"", b"bc"], ["ab"], False)
@example([b"xa", b"", b"bc"], ["ab"], True)
@example([b"a\xe2", b"\x82", b"\xacb"], ["€b"], False)
@example([b"\xe2", b"a"], [REPLACEMENT], False)
@example([b"\xf0\x9f"], [REPLACEMENT], False)
@example(["a😀".encode() + b"\xf0"], ["a"], True)
def test_a_completion_is_what_its_whole_bytes_say(tokens: list[bytes], stops: list[str], include: bool) -> None:
    deltas, text = complete(tokens, stops, include)
    tokens_placed, whole, stop = expected(tokens, stops, include)
    assert placed(deltas) == tokens_placed
    assert text_of(deltas) == whole
    assert deltas[-1].stop == stop
    assert text.byte_count == sum(len(token.bytes) for token in tokens_placed)


@given(TOKENS, STOPS, st.booleans())
def test_the_bytes_of_all_tokens_are_the_bytes_of_the_text(
    tokens: list[bytes], stops: list[str], include: bool
) -> None:
    deltas, _ = complete(tokens, stops, include)
    joined = b"".join(token.bytes for token in placed(deltas))
    assert joined.decode("utf-8", "replace") == text_of(deltas)


@given(TOKENS)
def test_without_stop_strings_every_token_comes_out_at_once(tokens: list[bytes]) -> None:
    deltas, _ = complete(tokens, [])
    assert [[token.bytes for token in delta.placed] for delta in deltas] == [*([token] for token in tokens), []]


@given(TOKENS, STOPS, st.booleans())
def test_text_told_is_never_taken_back(tokens: list[bytes], stops: list[str], include: bool) -> None:
    text = CompletionText(stops, include)
    told = ""
    for index, token in enumerate(tokens):
        delta = text.push(token)
        told += delta.text
        if delta.stop is not None:
            break
        for more in range(index, len(tokens)):
            assert expected(tokens[: more + 1], stops, include)[1].startswith(told)


def test_tokens_wait_while_a_stop_string_may_cut_them() -> None:
    text = CompletionText(["END"], include_stop=False)
    assert [token.bytes for token in text.push(b"one E").placed] == []
    assert [token.bytes for token in text.push(b"N").placed] == []
    delta = text.push(b"T two")
    assert [token.bytes for token in delta.placed] == [b"one E", b"N", b"T two"]
    assert delta.text == "ENT two"


def test_a_stop_string_trims_every_token_it_reaches() -> None:
    deltas, text = complete([b"one E", b"N", b"D two"], ["END"])
    assert [(token.bytes, token.byte_offset, token.trimmed) for token in placed(deltas)] == [
        (b"one ", 0, True),
        (b"", 4, True),
        (b"", 4, True),
    ]
    assert (text_of(deltas), deltas[-1].stop, text.byte_count) == ("one ", "END", 4)


def test_a_kept_stop_string_trims_what_follows_it() -> None:
    deltas, text = complete([b"one E", b"N", b"D two"], ["END"], include=True)
    assert [(token.bytes, token.trimmed) for token in placed(deltas)] == [
        (b"one E", False),
        (b"N", False),
        (b"D", True),
    ]
    assert (text_of(deltas), text.byte_count) == ("one END", 7)


def test_an_unmatched_token_is_not_searched_and_no_match_reaches_into_it() -> None:
    deltas, _ = complete([b"END E", b"ND", b" END"], ["END"], unmatched=1)
    assert text_of(deltas[:1]) == "END E"
    assert [token.bytes for token in placed(deltas)] == [b"END E", b"ND", b" "]


def test_an_unmatched_token_lets_out_what_was_held() -> None:
    completion = CompletionText(["END"], include_stop=False)
    completion.push(b"EN")
    delta = completion.push(b"D", match_stops=False)
    assert (delta.text, delta.stop) == ("END", None)
    assert [token.bytes for token in delta.placed] == [b"EN", b"D"]


def test_a_character_is_matched_with_the_token_that_completes_it() -> None:
    deltas, _ = complete([GRIN[:2], GRIN[2:]], ["😀"], unmatched=1)
    assert [(token.bytes, token.trimmed) for token in placed(deltas)] == [(b"", True), (b"", True)]


@pytest.mark.parametrize(
    ("keep", "bytes_kept", "text", "trimmed"),
    [pytest.param(True, b"END.", "EEND.", False, id="kept"), pytest.param(False, b"", "E", True, id="trimmed")],
)
def test_a_stop_token_is_kept_whole_or_trimmed_and_never_matched(
    keep: bool, bytes_kept: bytes, text: str, trimmed: bool
) -> None:
    completion = CompletionText(["END"], include_stop=False)
    held = completion.push(b"E")
    last = completion.push_stop_token(b"END.", keep)
    assert held.text + last.text == text
    assert [(token.bytes, token.trimmed) for token in last.placed] == [(b"E", False), (bytes_kept, trimmed)]
    assert (last.stop, completion.byte_count) == (None, len(text))


def test_a_stop_token_without_bytes_is_not_trimmed() -> None:
    completion = CompletionText([], include_stop=False)
    (token,) = completion.push_stop_token(b"", keep=False).placed
    assert not token.trimmed


def test_a_stop_token_ends_an_incomplete_character() -> None:
    completion = CompletionText([], include_stop=False)
    assert completion.push(GRIN[:3]).text == ""
    assert completion.push_stop_token(b"!", keep=True).text == f"{REPLACEMENT}!"


def test_flush_tells_what_was_held() -> None:
    completion = CompletionText(["END"], include_stop=False)
    held = completion.push(b"EN" + GRIN[:1])
    last = completion.flush()
    assert (held.placed, held.text) == ((), "")
    assert [token.bytes for token in last.placed] == [b"EN" + GRIN[:1]]
    assert (last.text, last.stop) == (f"EN{REPLACEMENT}", None)


@pytest.mark.parametrize("end", ["stop string", "stop token", "flush"])
def test_nothing_follows_the_end(end: str) -> None:
    completion = CompletionText(["x"], include_stop=False)
    match end:
        case "stop string":
            completion.push(b"x")
        case "stop token":
            completion.push_stop_token(b"", keep=False)
        case _:
            completion.flush()
    with pytest.raises(AssertionError):
        completion.push(b"more")
    with pytest.raises(AssertionError):
        completion.flush()
