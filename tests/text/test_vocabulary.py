"""Tokens have their exact bytes, with every kind of tokenizer, and say when the text is not what the model saw."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import tiny_tokenizers
from hypothesis import example, given
from hypothesis import strategies as st
from logprobs_server.text.vocabulary import UnsupportedTokenizerError, Vocabulary
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

PADDING = 5
"""Rows of the model's embedding that the tokenizer does not use."""

TEXTS = st.text(max_size=12) | st.text("the horse▁ 7é<>/s0xA\t\n", max_size=16)


def vocabulary_of(tokenizer: Tokenizer) -> Vocabulary:
    return Vocabulary(tokenizer, size=tokenizer.get_vocab_size() + PADDING)


TOKENIZERS = {kind: build() for kind, build in tiny_tokenizers.KINDS.items()}
VOCABULARIES = {kind: vocabulary_of(tokenizer) for kind, tokenizer in TOKENIZERS.items()}
EVERY_KIND = pytest.mark.parametrize("vocabulary", VOCABULARIES.values(), ids=VOCABULARIES.keys())


@pytest.fixture
def byte_level() -> Vocabulary:
    return VOCABULARIES["byte-level"]


@pytest.fixture
def byte_fallback() -> Vocabulary:
    return VOCABULARIES["byte fallback"]


@EVERY_KIND
@given(text=TEXTS, special=st.booleans())
@example(text="", special=True)
@example(text=" the", special=True)
@example(text="The ＡＢＣ e\u0301", special=False)
@example(text=" The", special=False)
def test_the_text_changed_exactly_where_the_pieces_are_not_its_bytes(
    vocabulary: Vocabulary, text: str, special: bool
) -> None:
    encoding = vocabulary.encode(text, special)
    assert encoding.text_changed == (b"".join(encoding.pieces) != text.encode())
    assert len(encoding.token_ids) == len(encoding.pieces)


@pytest.mark.parametrize("kind", ["byte-level", "byte fallback", "space splitting"])
@given(text=TEXTS.filter(lambda text: not set(text) & {"\x00", "▁"} and "<s>" not in text and "</s>" not in text))
@example(text="")
@example(text=" ")
@example(text="  the horse 7 ")
@example(text="e\u0301 日本語 😀\r\n\t")
def test_a_tokenizer_that_changes_nothing_keeps_every_text(kind: str, text: str) -> None:
    vocabulary = VOCABULARIES[kind]
    assert b"".join(vocabulary.encode(text, True).pieces) == text.encode()


@EVERY_KIND
@given(text=TEXTS)
def test_pieces_are_the_vocabularys_bytes_but_for_an_added_space(vocabulary: Vocabulary, text: str) -> None:
    encoding = vocabulary.encode(text, False)
    for index, (token_id, piece) in enumerate(zip(encoding.token_ids, encoding.pieces, strict=True)):
        if piece != vocabulary.spelled(token_id):
            assert piece == b"" or (index == 0 and b" " + piece == vocabulary.spelled(token_id))


@EVERY_KIND
@given(data=st.data())
def test_every_id_has_bytes_and_special_ones_have_none(vocabulary: Vocabulary, data: st.DataObject) -> None:
    token_id = data.draw(st.integers(0, vocabulary.size - 1))
    name = vocabulary.special_name(token_id)
    assert (token_id in vocabulary.special_tokens) == (name != "")
    if name:
        assert (vocabulary.token_bytes(token_id), vocabulary.spelled(token_id)) == (b"", name.encode())
    else:
        assert vocabulary.token_bytes(token_id) == vocabulary.spelled(token_id)


@pytest.mark.parametrize("kind", ["byte-level", "byte fallback", "space splitting", "normalising"])
@given(data=st.data())
def test_bytes_of_any_ids_decode_to_what_the_tokenizer_decodes(kind: str, data: st.DataObject) -> None:
    tokenizer, vocabulary = TOKENIZERS[kind], VOCABULARIES[kind]
    ids = data.draw(st.lists(st.integers(0, tokenizer.get_vocab_size() - 1).filter(lambda i: i > 2), max_size=8))
    text = b"".join(map(vocabulary.token_bytes, ids)).decode("utf-8", "replace")
    decoded = tokenizer.decode(ids)
    if "\N{REPLACEMENT CHARACTER}" not in text:  # broken bytes are replaced one by one with byte fallback
        assert decoded in (text, text.removeprefix(" "))


@EVERY_KIND
def test_padding_rows_have_no_bytes_and_are_not_special(vocabulary: Vocabulary) -> None:
    padding = range(vocabulary.size - PADDING, vocabulary.size)
    assert {vocabulary.token_bytes(i) + vocabulary.spelled(i) for i in padding} == {b""}
    assert not any(i in vocabulary.special_tokens for i in padding)


def test_a_split_character_has_one_byte_in_each_token(byte_fallback: Vocabulary) -> None:
    encoding = byte_fallback.encode("😀", False)
    assert encoding.pieces == (b"", b"\xf0", b"\x9f", b"\x98", b"\x80")  # the first is the added space
    assert not encoding.text_changed


def test_byte_level_pieces_go_through_the_byte_alphabet(byte_level: Vocabulary) -> None:
    encoding = byte_level.encode("\x07é\u00ad", False)
    assert b"".join(encoding.pieces) == b"\x07\xc3\xa9\xc2\xad"
    assert not encoding.text_changed


def test_bytes_without_a_token_change_the_text(byte_level: Vocabulary) -> None:
    encoding = byte_level.encode("a\x00b", False)
    assert (b"".join(encoding.pieces), encoding.text_changed) == (b"ab", True)


def test_added_special_tokens_have_no_bytes_and_spelled_ones_theirs(byte_fallback: Vocabulary) -> None:
    encoding = byte_fallback.encode("<s>", True)
    assert encoding.token_ids[0] == encoding.token_ids[1]
    assert (encoding.pieces, encoding.text_changed) == ((b"", b"<s>"), False)


def test_special_tokens_are_added_on_request_only(byte_fallback: Vocabulary) -> None:
    assert byte_fallback.encode("the", False).token_ids == byte_fallback.encode("the", True).token_ids[1:]


def test_added_tokens_are_bytes_as_they_are_spelled(byte_level: Vocabulary) -> None:
    encoding = byte_level.encode("a<tool é>", False)
    assert encoding.pieces[-1] == "<tool é>".encode()
    assert byte_level.token_bytes(encoding.token_ids[-1]) == "<tool é>".encode()


@pytest.mark.parametrize("kind", ["byte fallback", "unigram", "normalising", "word piece"])
def test_the_space_that_the_tokenizer_added_is_taken_off(kind: str) -> None:
    vocabulary = VOCABULARIES[kind]
    encoding = vocabulary.encode("the", False)
    assert (b"".join(encoding.pieces), encoding.text_changed) == (b"the", False)
    assert vocabulary.token_bytes(encoding.token_ids[0]).startswith(b" ")


@pytest.mark.parametrize("kind", ["byte-level", "byte fallback", "space splitting", "unigram", "normalising"])
def test_the_callers_own_leading_space_stays(kind: str) -> None:
    encoding = VOCABULARIES[kind].encode(" the", False)
    assert (b"".join(encoding.pieces), encoding.text_changed) == (b" the", False)


def test_a_space_that_is_an_added_tokens_own_stays() -> None:
    tokenizer = tiny_tokenizers.byte_fallback()
    tokenizer.add_tokens([AddedToken("  ", normalized=False)])
    encoding = Vocabulary(tokenizer, size=tokenizer.get_vocab_size()).encode("  the", False)
    assert (encoding.pieces, encoding.text_changed) == ((b"  ", b" the"), True)


def test_a_space_after_dropped_bytes_stays(byte_level: Vocabulary) -> None:
    encoding = byte_level.encode("\x00 a", False)
    assert (b"".join(encoding.pieces), encoding.text_changed) == (b" a", True)


def test_a_space_after_dropped_characters_stays_where_none_is_added() -> None:
    tokenizer = Tokenizer(models.BPE(vocab={"▁": 0, "a": 1}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="never")
    assert Vocabulary(tokenizer, size=2).encode("Ж a", False).pieces == (b" ", b"a")


def test_the_letter_that_stands_for_a_space_becomes_one() -> None:
    encoding = VOCABULARIES["unigram"].encode("▁the", False)
    assert (b"".join(encoding.pieces), encoding.text_changed) == (b" the", True)


def test_byte_fallback_needs_no_decoder_of_its_own() -> None:
    tokenizer = tiny_tokenizers.byte_fallback()
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse()])
    assert Vocabulary(tokenizer, size=tokenizer.get_vocab_size()).encode("é", False).pieces == (b"", b"\xc3", b"\xa9")


@pytest.mark.parametrize(
    ("text", "seen"),
    [
        pytest.param("ＴＨＥ", b"the", id="an added space is taken off"),
        pytest.param(" THE", b" the", id="the caller's own space stays"),
        pytest.param("\u3000THE", b" the", id="a space that came of another character stays"),
        pytest.param("E\u0301", "é".encode(), id="composed"),
    ],
)
def test_a_text_that_is_normalised_is_what_the_model_saw(text: str, seen: bytes) -> None:
    encoding = VOCABULARIES["normalising"].encode(text, False)
    assert (b"".join(encoding.pieces), encoding.text_changed) == (seen, True)


@pytest.mark.parametrize("kind", ["unigram", "word piece"])
def test_an_unknown_token_has_no_bytes(kind: str) -> None:
    vocabulary = VOCABULARIES[kind]
    encoding = vocabulary.encode("the Ж", False)
    assert vocabulary.special_name(encoding.token_ids[-1]).lower() in ("<unk>", "[unk]")
    assert (encoding.pieces[-1], encoding.text_changed) == (b"", True)


def test_an_unknown_token_that_the_text_spells_has_its_spelling() -> None:
    encoding = VOCABULARIES["unigram"].encode("the<unk>", False)
    assert (encoding.pieces[-1], encoding.text_changed) == (b"<unk>", False)


def test_word_pieces_are_words_after_a_space_and_parts_without() -> None:
    vocabulary = VOCABULARIES["word piece"]
    encoding = vocabulary.encode("the horses", True)
    assert (encoding.pieces[0], encoding.pieces[-1], encoding.text_changed) == (b"", b"", False)
    assert b"".join(encoding.pieces) == b"the horses"


@EVERY_KIND
@given(context=TEXTS, continuation=TEXTS)
@example(context="", continuation="")
@example(context="", continuation="</s>")
@example(context="the hor", continuation="se")
@example(context="the ", continuation="horse")
@example(context="e", continuation="\u0301")
def test_a_pair_is_its_text_tokenised_as_one(vocabulary: Vocabulary, context: str, continuation: str) -> None:
    pair = vocabulary.encode_pair(context, continuation, True)
    whole, alone = vocabulary.encode(context + continuation, True), vocabulary.encode(context, True)
    assert (pair.token_ids, pair.pieces, pair.text_changed) == (whole.token_ids, whole.pieces, whole.text_changed)
    assert pair.token_ids[: pair.first_scored] == alone.token_ids[: pair.first_scored]
    if not pair.text_changed:
        assert pair.context_byte_count == len(context.encode())
        assert len(b"".join(pair.pieces[: pair.first_scored])) <= pair.context_byte_count


def test_a_token_across_the_boundary_is_the_continuations(byte_fallback: Vocabulary) -> None:
    pair = byte_fallback.encode_pair("a t", "he", True)
    assert pair.pieces == (b"", b"", b"a", b" the")
    assert (pair.first_scored, pair.context_byte_count) == (3, 3)


def test_a_changed_context_ends_where_the_model_saw_its_end() -> None:
    pair = VOCABULARIES["normalising"].encode_pair("ＴＨＥ", " horse", True)
    assert b"".join(pair.pieces) == b"the horse"
    assert pair.context_byte_count == len("the")


def test_what_the_tokenizer_puts_after_a_text_belongs_to_the_continuation() -> None:
    vocabulary = VOCABULARIES["unigram"]
    pair = vocabulary.encode_pair("the", " horse", True)
    assert vocabulary.special_name(pair.token_ids[-1]) == "</s>"
    assert b"".join(pair.pieces[pair.first_scored :]) == b" horse"


def test_a_continuation_that_spells_the_contexts_end_is_scored() -> None:
    pair = VOCABULARIES["unigram"].encode_pair("the", "</s>", True)
    assert b"".join(pair.pieces[pair.first_scored :]) == b"</s>"


def test_an_empty_continuation_has_no_tokens(byte_fallback: Vocabulary) -> None:
    pair = byte_fallback.encode_pair("the", "", True)
    assert pair.first_scored == len(pair.token_ids)


def test_truncation_and_padding_are_switched_off() -> None:
    tokenizer = tiny_tokenizers.byte_level()
    tokenizer.enable_truncation(1)
    tokenizer.enable_padding(length=9)
    vocabulary = Vocabulary(tokenizer, size=tokenizer.get_vocab_size())
    assert vocabulary.encode("2024", True).pieces == (b"2", b"0", b"2", b"4")


def test_the_revision_tells_tokenizers_apart() -> None:
    revisions = {vocabulary.revision for vocabulary in VOCABULARIES.values()}
    assert len(revisions) == len(VOCABULARIES)
    assert vocabulary_of(tiny_tokenizers.byte_fallback()).revision in revisions


def characters_only() -> Tokenizer:
    return Tokenizer(models.BPE(vocab={"a": 0}, merges=[]))


def decoded_by(decoder: decoders.Decoder) -> Callable[[], Tokenizer]:
    def build() -> Tokenizer:
        tokenizer = characters_only()
        tokenizer.decoder = decoder
        return tokenizer

    return build


def random_merges() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(vocab={"a": 0}, merges=[], dropout=0.5))
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        pytest.param(characters_only, "no decoder", id="no decoder"),
        pytest.param(decoded_by(decoders.CTC()), "CTC", id="decoder of another trade"),
        pytest.param(
            decoded_by(decoders.Sequence([decoders.ByteLevel(), decoders.Replace("a", "b")])), "ByteLevel", id="mixed"
        ),
        pytest.param(decoded_by(decoders.Strip(" ", 1, 0)), "strips", id="strips every token"),
        pytest.param(decoded_by(decoders.Replace(Regex("a+"), "b")), "regular expression", id="pattern"),
        pytest.param(random_merges, "random", id="random merges"),
    ],
)
def test_a_tokenizer_whose_bytes_cannot_be_known_is_refused(build: Callable[[], Tokenizer], reason: str) -> None:
    with pytest.raises(UnsupportedTokenizerError, match=reason):
        Vocabulary(build(), size=100)


def test_a_model_with_fewer_tokens_than_its_tokenizer_is_refused() -> None:
    tokenizer = tiny_tokenizers.byte_level()
    size = tokenizer.get_vocab_size()
    assert Vocabulary(tokenizer, size=size).size == size
    with pytest.raises(UnsupportedTokenizerError, match=str(size - 1)):
        Vocabulary(tokenizer, size=size - 1)


def test_a_byte_level_pre_tokenizer_is_enough() -> None:
    tokenizer = Tokenizer(models.BPE(vocab={"Ġ": 0, "a": 1, "Ж": 2}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    vocabulary = Vocabulary(tokenizer, size=3)
    assert [vocabulary.token_bytes(i) for i in range(3)] == [b" ", b"a", "Ж".encode()]
