"""Bytes and text agree, whatever is drawn and wherever it ends: characters of several tokens, and broken ones."""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import pytest
from harness import GREEDY, Served, Stream, ids, text, uniform
from logprobs.v1 import logprobs_pb2 as pb
from texts import TEXTS

EMOJI = "Emoji: 😀😃😄😁😆😅😂🤣😊😇🙂🙃😉😌😍🥰😘😗😙😚 Again: 😀😃😄😁😆😅"
CHINESE = "一二三四五六七八九十。一二三四五六七八九十。一二三"
PROMPTS = {"emoji": EMOJI, "Chinese": CHINESE, "Japanese": "吾輩は猫である。名前はまだ無い。吾輩は猫で"}
SPECIAL_TEXT = "a<|eos|>b"


def check_agreement(served: Served, stream: Stream, completion: int = 0) -> None:
    """Bytes, text, offsets and Detokenize say the same of a completion."""
    joined = stream.bytes(completion)
    assert joined.decode(errors="replace") == stream.text(completion)
    assert stream.finished(completion).totals.byte_count == len(joined)
    told = served.stub.Detokenize(pb.DetokenizeRequest(token_ids=stream.token_ids(completion)))
    assert (told.bytes, told.text) == (joined, stream.text(completion))
    for token, offset in zip(stream.tokens(completion), _offsets(stream, completion), strict=True):
        assert token.byte_offset == offset


def _offsets(stream: Stream, completion: int) -> list[int]:
    lengths = [len(token.bytes) for token in stream.tokens(completion)]
    return list(accumulate(lengths, initial=0))[:-1]


def generated(served: Served, prompt: pb.Input, **fields: Any) -> Stream:
    """A greedy completion of some tokens, but for what is given."""
    request = {"max_tokens": 12, "sampling": GREEDY, **fields}
    return served.generate(pb.GenerateRequest(prompt=prompt, **request))


def is_whole(data: bytes) -> bool:
    """Whether bytes end where a character ends."""
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


@pytest.fixture(scope="module", params=PROMPTS)
def whole(request: pytest.FixtureRequest, embedded: Served) -> Stream:
    """A completion that the embedded model writes in another script."""
    return generated(embedded, text(PROMPTS[request.param]))


def test_bytes_and_text_of_other_scripts_agree(whole: Stream, embedded: Served) -> None:
    assert not whole.text().isascii()
    check_agreement(embedded, whole)


def test_streamed_text_never_breaks_a_character(whole: Stream) -> None:
    texts = [delta.text for response in whole.responses for delta in response.decoded.deltas]
    assert all("�" not in part for part in texts[:-1])


@pytest.mark.parametrize("prompt", ["emoji", "Chinese"])
def test_an_end_inside_a_character_keeps_its_bytes(prompt: str, embedded: Served) -> None:
    tokens = generated(embedded, text(PROMPTS[prompt])).tokens()
    ends = accumulate(token.bytes for token in tokens)
    cut = next(count for count, data in enumerate(ends, start=1) if not is_whole(data))
    stream = generated(embedded, text(PROMPTS[prompt]), max_tokens=cut)
    assert [token.id for token in stream.tokens()] == [token.id for token in tokens[:cut]]
    assert stream.text().endswith("�")
    check_agreement(embedded, stream)


def test_a_prompt_that_ends_inside_a_character_is_completed(embedded: Served) -> None:
    given = embedded.stub.Tokenize(pb.TokenizeRequest(input=text(EMOJI + "😂"))).tokens
    cut = max(i for i in range(len(given)) if not is_whole(b"".join(token.bytes for token in given[:i])))
    stream = generated(embedded, ids([token.id for token in given[:cut]]))
    start = b"".join(token.bytes for token in given[:cut])
    assert not is_whole(stream.bytes())
    assert stream.text().startswith("�")
    assert (start + stream.bytes()).decode(errors="ignore").startswith(EMOJI)
    check_agreement(embedded, stream)


@pytest.mark.parametrize("model", ["tiny", "embedded"])
def test_bytes_and_text_of_random_tokens_agree(model: str, request: pytest.FixtureRequest) -> None:
    served: Served = request.getfixturevalue(model)
    stream = generated(
        served, text("a"), max_tokens=30, completion_count=4, sampling=uniform(1), stopping=pb.Stopping(ignore_eos=True)
    )
    texts = [stream.text(i) for i in range(4)]
    if model == "tiny":  # most of its tokens are single bytes
        assert any("�" in one for one in texts)
    for i in range(4):
        check_agreement(served, stream, i)


@pytest.mark.parametrize("model", ["tiny", "embedded"])
def test_tokenizing_and_detokenizing_gives_the_text_back(model: str, request: pytest.FixtureRequest) -> None:
    served: Served = request.getfixturevalue(model)
    for content in (*TEXTS, "", EMOJI, CHINESE, "".join(TEXTS)):
        told = served.stub.Tokenize(pb.TokenizeRequest(input=text(content)))
        assert not told.text_changed
        assert b"".join(token.bytes for token in told.tokens) == content.encode()
        again = served.stub.Detokenize(pb.DetokenizeRequest(token_ids=[token.id for token in told.tokens]))
        assert (again.bytes, again.text) == (content.encode(), content)


def test_offsets_of_a_text_count_bytes_and_code_points(tiny: Served) -> None:
    tokens = tiny.stub.Tokenize(pb.TokenizeRequest(input=text("é🙂a"))).tokens
    assert [(token.byte_offset, token.code_point_offset) for token in tokens] == [
        (0, 0),
        (1, 0),
        (2, 1),
        (3, 1),
        (4, 1),
        (5, 1),
        (6, 2),
    ]


def test_special_tokens_are_spelled_where_the_text_spells_them(tiny: Served) -> None:
    told = tiny.stub.Tokenize(pb.TokenizeRequest(input=text(SPECIAL_TEXT)))
    assert [token.bytes for token in told.tokens] == [b"a", b"<|eos|>", b"b"]
    assert [token.special for token in told.tokens] == [False, True, False]
    assert told.tokens[1].special_name == "<|eos|>"
    assert not told.text_changed


@pytest.mark.parametrize(("keep", "expected"), [(False, "ab"), (True, SPECIAL_TEXT)], ids=["left out", "kept"])
def test_detokenized_special_tokens_are_spelled_if_kept(keep: bool, expected: str, tiny: Served) -> None:
    tokens = tiny.stub.Tokenize(pb.TokenizeRequest(input=text(SPECIAL_TEXT))).tokens
    request = pb.DetokenizeRequest(token_ids=[token.id for token in tokens], keep_special=keep)
    assert tiny.stub.Detokenize(request).text == expected


def test_tokenized_tokens_have_no_logprobs(tiny: Served) -> None:
    for token in tiny.stub.Tokenize(pb.TokenizeRequest(input=text("ab"))).tokens:
        assert not token.HasField("logprob")
        assert not token.HasField("rank")
