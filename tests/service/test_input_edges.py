"""The edges of what can be given: each works, says what it changed, or is refused with one clear error."""

from __future__ import annotations

import unicodedata
from typing import Any

import grpc
import pytest
from harness import GREEDY, SERVICE, Served, ids, refusal, text
from logprobs import Client, InvalidTextError
from logprobs.v1 import logprobs_pb2 as pb
from texts import TEXTS

MEGABYTE = 1_000_000
SPECIAL = "<|im_start|><|im_end|><|endoftext|>"


def tokenized(served: Served, given: pb.Input) -> pb.TokenizeResponse:
    return served.stub.Tokenize(pb.TokenizeRequest(input=given))


def generation(given: pb.Input) -> pb.GenerateRequest:
    return pb.GenerateRequest(prompt=given, max_tokens=1, sampling=GREEDY, prompt_logprobs=pb.LogprobOptions())


KEPT = {
    "a letter": "a",
    "white space": " \t\r\n\u3000",
    "only special tokens": SPECIAL,
    "special tokens between": f"a{SPECIAL} b",
    "what is nearly a special token": "<|im_start|",
    "escape characters": "\x1b[31m\x07\x7f",
    "composed": unicodedata.normalize("NFC", "Ünïcödé é"),
    "decomposed": unicodedata.normalize("NFD", "Ünïcödé é"),
    "byte order mark": "\ufeffa",
    "not characters": "\ufffe\uffff\U0010ffff",
    "a replacement character": "\ufffd",
    "joined emoji": "👩‍👩‍👧‍👦",
    "private use": "\ue000\U000f0000",
    "right to left": "\u202eabc\u202c",
}


@pytest.mark.parametrize("case", KEPT)
@pytest.mark.parametrize("special", [True, False], ids=["special", "plain"])
def test_a_text_keeps_its_bytes_in_every_call(case: str, special: bool, embedded: Served) -> None:
    content = KEPT[case]
    given = pb.Input(text=content, add_special_tokens=special)
    told = tokenized(embedded, given)
    [scored] = embedded.score(pb.ScoreRequest(context=given))
    stream = embedded.generate(generation(given))
    for tokens in (told.tokens, scored.tokens, stream.prompt_tokens):
        assert b"".join(token.bytes for token in tokens).decode() == content
        assert [token.id for token in tokens] == [token.id for token in told.tokens]
    assert not told.text_changed
    assert not scored.text_changed
    assert scored.totals.byte_count == len(content.encode())
    assert len(stream.tokens()) == 1


DROPPED = {"a control character": "a\x13b", "beyond the vocabulary's bytes": "a\U00040000b"}


@pytest.mark.parametrize("case", DROPPED)
def test_a_text_that_loses_bytes_says_so_in_every_call(case: str, embedded: Served) -> None:
    given = text(DROPPED[case])
    told = tokenized(embedded, given)
    [scored] = embedded.score(pb.ScoreRequest(context=given))
    stream = embedded.generate(generation(given))
    prompts = [response.prompt_scored for response in stream.responses if response.HasField("prompt_scored")]
    assert told.text_changed
    assert scored.text_changed
    assert all(prompt.text_changed for prompt in prompts)
    seen = b"".join(token.bytes for token in told.tokens)
    assert seen.startswith(b"a")
    assert seen.endswith(b"b")
    assert b"".join(token.bytes for token in stream.prompt_tokens) == seen
    assert scored.totals.byte_count == len(seen) < len(DROPPED[case].encode())


def test_only_special_tokens_are_told_by_name_and_spelled_by_the_text(embedded: Served) -> None:
    tokens = tokenized(embedded, text(SPECIAL)).tokens
    assert [token.special_name for token in tokens] == ["<|im_start|>", "<|im_end|>", "<|endoftext|>"]
    assert [token.bytes.decode() for token in tokens] == [token.special_name for token in tokens]
    again = tokenized(embedded, ids([token.id for token in tokens])).tokens
    assert [token.bytes for token in again] == [b""] * 3
    assert [token.special_name for token in again] == [token.special_name for token in tokens]


@pytest.mark.parametrize("empty", [text(""), ids([])], ids=["text", "ids"])
def test_nothing_is_tokenised_and_scored_and_not_generated_from(empty: pb.Input, embedded: Served) -> None:
    assert tokenized(embedded, empty) == pb.TokenizeResponse()
    [scored] = embedded.score(pb.ScoreRequest(context=empty))
    assert scored == pb.ScoredSequence(totals=pb.Totals(), greedy=True)
    refused = refusal(lambda: embedded.generate(generation(empty)))
    assert refused.violations == [("prompt", "has no tokens, and the tokenizer adds none")]


@pytest.mark.parametrize("token_id", [-(2**31), -1, 49152, 2**31 - 1])
def test_an_id_out_of_range_is_refused_in_every_call(token_id: int, embedded: Served) -> None:
    given = ids([0, token_id])
    calls: dict[str, Any] = {
        "input": lambda: tokenized(embedded, given),
        "context": lambda: embedded.score(pb.ScoreRequest(context=given)),
        "prompt": lambda: embedded.generate(generation(given)),
    }
    for field, call in calls.items():
        assert refusal(call).violations == [
            (f"{field}.token_ids.ids[1]", f"{token_id} is outside the vocabulary, [0, 49151]")
        ]


LARGE = {
    "words": ("word " * (MEGABYTE // 5)),
    "one word": "a" * MEGABYTE,
    "spaces": " " * MEGABYTE,
    "emoji": "👍🏽" * (MEGABYTE // 8),
}


@pytest.mark.parametrize("case", LARGE)
def test_a_megabyte_is_refused_for_its_length_and_told_how_long_it_is(case: str, embedded: Served) -> None:
    given = text(LARGE[case])
    refused = refusal(lambda: embedded.score(pb.ScoreRequest(context=given)))
    [(field, description)] = refused.violations
    assert (refused.code, field) == (grpc.StatusCode.INVALID_ARGUMENT, "context")
    assert description.endswith("tokens; the model's context holds 1024")
    assert int(description.split()[1]) > 1024
    [(field, _)] = refusal(lambda: embedded.generate(generation(given))).violations
    assert field == "prompt"
    pair = pb.ScoreRequest(context=given, continuations=[text("a"), text("b")])
    assert refusal(lambda: embedded.score(pair)).violations == [("context", description)]


def test_a_megabyte_is_tokenised_or_refused_for_the_size_of_the_answer(embedded: Served) -> None:
    refused = refusal(lambda: tokenized(embedded, text(LARGE["words"])))
    assert refused.fields == ["input"]
    assert "the answer could need" in refused.violations[0][1]
    few = tokenized(embedded, text(LARGE["spaces"][: MEGABYTE // 2] + "end"))
    assert b"".join(token.bytes for token in few.tokens) == LARGE["spaces"][: MEGABYTE // 2].encode() + b"end"


def test_the_end_of_a_megabyte_is_scored_in_windows(embedded: Served) -> None:
    request = pb.ScoreRequest(
        context=text(LARGE["words"]), continuations=[text("the end")], long_input=pb.LONG_INPUT_ROLL
    )
    [sequence] = embedded.score(request)
    assert b"".join(token.bytes for token in sequence.tokens) == b" the end"
    assert sequence.tokens[0].byte_offset == -1  # the context's last space is the first token's
    assert sequence.context_token_count > 100_000


def test_a_large_context_is_not_tokenised_with_every_continuation(embedded: Served) -> None:
    request = pb.ScoreRequest(
        context=text(LARGE["words"]), continuations=[text("a")] * 70, long_input=pb.LONG_INPUT_ROLL
    )
    [(field, description)] = refusal(lambda: embedded.score(request)).violations
    assert field == "continuations"
    assert (
        description == "70 with a context of 1,000,000 bytes each are more than the 67,108,864 bytes tokenised at once"
    )


def test_text_that_is_no_utf_8_is_malformed_on_a_stream_too(tiny: Served) -> None:
    broken = b"\x12\x05\x0a\x03\x0a\x01\xff"  # request.context.text
    call: Any = tiny.channel.stream_stream(f"/{SERVICE}/ScoreStream")
    refused = refusal(lambda: list(call(iter([broken]))))
    assert (refused.code, refused.info.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "MALFORMED_REQUEST")


def test_lone_surrogates_are_refused_by_the_client_itself(tiny: Served) -> None:
    with Client(tiny.target) as client:
        calls: list[Any] = [
            lambda: client.score("\ud800"),
            lambda: client.score("a", ["b", "\udfff"]),
            lambda: client.tokenize("a\udc80"),
            lambda: client.generate([{"role": "user", "content": "\ud800"}]),
        ]
        for call in calls:
            with pytest.raises(InvalidTextError, match="lone surrogate"):
                call()


def test_texts_of_many_scripts_keep_their_bytes_over_the_wire(embedded: Served) -> None:
    for content in TEXTS:
        told = tokenized(embedded, text(content))
        joined = b"".join(token.bytes for token in told.tokens)
        assert told.text_changed == (joined != content.encode())
        points = [len(joined[: token.byte_offset].decode(errors="ignore")) for token in told.tokens]
        assert [token.code_point_offset for token in told.tokens] == points
