"""Where stop strings end a completion, whatever tokens and characters they cross: text, tokens and totals agree.

Completions are scripted: biases rank the wanted tokens, a presence penalty takes each out once it is drawn.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from random import Random
from typing import Any

import pytest
from harness import Served, Stream, ids
from logprobs.v1 import logprobs_pb2 as pb
from text_oracles import REPLACEMENT, complete_characters, cut_at_first_stop, first_stop

PROMPT = ids([72, 105, 81])
SPLIT = "é🙂"
"""Every byte of these is a token of its own."""


def scripted(served: Served, script: Sequence[int], **stopping: Any) -> Stream:
    """A completion that draws these tokens, each once, until something stops it."""
    bias = {token_id: 1e6 - 1e3 * place for place, token_id in enumerate(script)}
    return served.generate(
        pb.GenerateRequest(
            prompt=PROMPT,
            max_tokens=len(script),
            sampling=pb.Sampling(temperature=0, logit_bias=bias, presence_penalty=1e7),
            stopping=pb.Stopping(**stopping),
        )
    )


@pytest.fixture(scope="module")
def byte_ids(tiny: Served) -> dict[bytes, int]:
    """The tokens of single bytes."""
    tokens = tiny.stub.Tokenize(pb.TokenizeRequest(input=ids(range(300)))).tokens
    return {token.bytes: token.id for token in tokens if len(token.bytes) == 1}


def random_script(chance: Random, byte_ids: dict[bytes, int]) -> list[int]:
    """Distinct tokens, among them those of split characters, whole and in order."""
    split = [byte_ids[bytes([byte])] for byte in SPLIT.encode()]
    script = [token_id for token_id in chance.sample(range(1, 300), 14) if token_id not in split]
    place = chance.randrange(len(script))
    return [*script[:place], *split, *script[place:]]


def random_stops(chance: Random, text: str) -> list[str]:
    """Strings that the text holds, some of which may overlap."""
    places = [(chance.randrange(len(text)), chance.randint(1, 4)) for _ in range(chance.randint(1, 3))]
    return [text[start : start + length] for start, length in places]


def test_a_script_is_what_is_drawn(tiny: Served, byte_ids: dict[bytes, int]) -> None:
    for case in range(5):
        script = random_script(Random(case), byte_ids)
        stream = scripted(tiny, script)
        assert stream.token_ids() == script
        assert SPLIT in stream.text()


@pytest.mark.parametrize("include", [False, True], ids=["trimmed", "kept"])
def test_the_match_that_ends_first_then_the_longest_ends_a_completion(
    include: bool, tiny: Served, byte_ids: dict[bytes, int]
) -> None:
    for case in range(60):
        chance = Random(case)
        plain = scripted(tiny, random_script(chance, byte_ids))
        stops = [stop for stop in random_stops(chance, plain.text()) if REPLACEMENT not in stop] or ["🙂"]
        stream = scripted(tiny, plain.token_ids(), strings=stops, include=include)
        _check_stopped(stream, plain, stops, include)


def _check_stopped(stream: Stream, plain: Stream, stops: Sequence[str], include: bool) -> None:
    """A completion is what is left of the plain one, found by looking at ever longer starts of that."""
    starts = (plain.tokens()[:count] for count in range(1, len(plain.tokens()) + 1))
    drawn, text = next(
        (tokens, seen)
        for tokens in starts
        if first_stop(seen := complete_characters(b"".join(token.bytes for token in tokens)), stops)
    )
    stop = first_stop(text, stops)
    assert (stream.finished().reason, stream.finished().stop_string) == (pb.FINISH_REASON_STOP_STRING, stop)
    assert stream.text() == cut_at_first_stop(text, stops) + (stop or "") * include
    assert stream.bytes().decode(errors="replace") == stream.text()
    assert stream.token_ids() == [token.id for token in drawn]
    before = 0
    for token, whole in zip(stream.tokens(), drawn, strict=True):
        assert whole.bytes.startswith(token.bytes)
        assert token.trimmed == (token.bytes != whole.bytes)
        assert (token.logprob, token.rank) == (pytest.approx(whole.logprob, abs=1e-4), whole.rank)
        assert token.byte_offset == before
        before += len(token.bytes)
    totals = stream.finished().totals
    assert (totals.token_count, totals.byte_count) == (len(drawn), before)
    assert totals.logprob == pytest.approx(math.fsum(token.logprob for token in drawn), rel=1e-6)


@pytest.mark.parametrize(
    ("stops", "matched"),
    [(["é🙂", "é"], "é"), (["🙂", "é🙂"], "é🙂"), (["never", "🙂"], "🙂"), (["é🙂", "🙂"], "é🙂")],
    ids=["ends first", "longest of two", "one never comes", "longest of two, other order"],
)
def test_a_stop_of_split_characters_is_told(
    stops: list[str], matched: str, tiny: Served, byte_ids: dict[bytes, int]
) -> None:
    script = [byte_ids[bytes([byte])] for byte in f"x{SPLIT}y".encode()]
    stream = scripted(tiny, script, strings=stops)
    assert (stream.finished().stop_string, stream.text()) == (matched, "x" + SPLIT.partition(matched)[0])
    assert len(stream.tokens()) == 1 + len(SPLIT.partition(matched)[0].encode() + matched.encode())


def test_what_may_become_a_stop_is_held_and_released_when_it_does_not(tiny: Served, byte_ids: dict[bytes, int]) -> None:
    script = [byte_ids[character.encode()] for character in "abcdefg"]
    stream = scripted(tiny, script, strings=["bcdx"])
    pieces = [delta.text for response in stream.responses for delta in response.decoded.deltas]
    assert "".join(pieces) == "abcdefg"
    assert not any(piece.endswith(("b", "bc", "bcd")) for piece in pieces)
    assert stream.finished().reason == pb.FINISH_REASON_MAX_TOKENS


def test_until_min_tokens_nothing_is_matched_and_nothing_reaches_back(tiny: Served, byte_ids: dict[bytes, int]) -> None:
    script = [byte_ids[character.encode()] for character in "abcdefg"]
    for min_tokens, text in {1: "a", 2: "abcd", 4: "abcd", 5: "abcdefg"}.items():
        assert scripted(tiny, script, strings=["bc", "ef"], min_tokens=min_tokens).text() == text
