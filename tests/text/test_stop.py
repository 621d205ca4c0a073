"""Stop strings are found the same however text is cut. The oracle searches the whole text at every end in turn."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from logprobs_server.text.stop import StopMatcher
from text_oracles import cut_at_first_stop, first_stop

PIECES = st.lists(st.text("abc", max_size=6), max_size=8)
STOPS = st.lists(st.text("abc", min_size=1, max_size=6), max_size=4)


def may_become_stop(text: str, stops: Sequence[str]) -> str:
    """The longest end of the text that some stop string starts with."""
    return next(text[i:] for i in range(len(text) + 1) if any(stop.startswith(text[i:]) for stop in [*stops, ""]))


@given(PIECES, STOPS)
@example(list("aaab"), ["aab"])  # the match starts inside a failed one
@example(["abc"], ["abc", "b"])  # the match that ends first wins, …
@example(["abc"], ["bc", "abc"])  # … then the longest
@example(["abcabd"], ["abcabe", "cabd"])
@example(list("ababac"), ["abac", "bab"])
def test_stop_matching_does_not_depend_on_how_text_is_cut(pieces: list[str], stops: list[str]) -> None:
    matcher = StopMatcher(stops)
    shown = "".join(map(matcher.push, pieces)) + matcher.flush()
    whole = "".join(pieces)
    assert shown == cut_at_first_stop(whole, stops)
    assert matcher.matched == first_stop(whole, stops)


@given(PIECES, STOPS)
def test_just_what_may_still_become_a_stop_string_is_held(pieces: list[str], stops: list[str]) -> None:
    matcher = StopMatcher(stops)
    shown, text = "", ""
    for piece in pieces:
        shown += matcher.push(piece)
        text += piece
        if matcher.matched is not None:
            break
        assert shown + may_become_stop(text, stops) == text


@pytest.mark.parametrize("text", ["", "plain text", "é😀"])
def test_without_stop_strings_all_text_is_certain(text: str) -> None:
    assert StopMatcher([]).push(text) == text


def test_after_a_match_nothing_comes_out() -> None:
    matcher = StopMatcher(["b"])
    assert matcher.push("abc") == "a"
    assert (matcher.push("more"), matcher.flush(), matcher.matched) == ("", "", "b")


def test_no_match_reaches_back_over_a_flush() -> None:
    matcher = StopMatcher(["ab"])
    assert (matcher.push("xa"), matcher.flush()) == ("x", "a")
    assert matcher.push("bca") == "bc"
    assert matcher.matched is None
    assert matcher.push("b") == ""
    assert matcher.matched == "ab"


def test_an_empty_stop_string_is_a_mistake_of_the_caller() -> None:
    with pytest.raises(AssertionError):
        StopMatcher([""])
