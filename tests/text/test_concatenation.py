"""The bytes of all tokens put together are the bytes of the text, for thousands of random sequences and texts.

What the text should have become is asked of the tokenizer's own decoder or normaliser, not of our spelling.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from pathlib import Path

import pytest
import tiny_tokenizers
from logprobs.v1 import logprobs_pb2 as pb
from logprobs_server.engine.model.checkpoint import load_tokenizer
from logprobs_server.engine.types import ModelDescription
from logprobs_server.inputs import InputReader
from logprobs_server.requests import GivenText
from logprobs_server.rules import Rules
from logprobs_server.text.completion import CompletionText
from logprobs_server.text.vocabulary import Vocabulary
from random_texts import random_ids, random_texts
from tokenizers import Tokenizer, normalizers

COUNT = 10_000
FEWER = 2_000


def reader_of(vocabulary: Vocabulary) -> InputReader:
    """What turns inputs into tokens, without a model."""
    description = ModelDescription(
        name="m",
        revision="r",
        dtype="float32",
        batch_invariant=False,
        vocabulary_size=vocabulary.size,
        context_length=64,
        eos_token_ids=(),
        bos_token_id=None,
    )
    return InputReader(vocabulary, description, None)


@pytest.fixture(scope="module")
def embedded(embedded_folder: Path) -> Tokenizer:
    """The embedded model's tokenizer."""
    return load_tokenizer(str(embedded_folder), "embedded").tokenizer


@pytest.fixture(scope="module")
def vocabulary(embedded: Tokenizer) -> Vocabulary:
    return Vocabulary(embedded, size=embedded.get_vocab_size())


def check_offsets(text: GivenText) -> bytes:
    """Every token starts where those before it end, in bytes and characters; gives the bytes of all."""
    joined = b"".join(text.pieces)
    starts = list(accumulate(map(len, text.pieces), initial=0))
    assert list(text.byte_offsets) == starts[:-1]
    assert text.byte_count == starts[-1]
    assert list(text.code_point_offsets) == sorted(text.code_point_offsets)
    for start, points in zip(text.byte_offsets, text.code_point_offsets, strict=True):
        before = joined[:start].decode(errors="replace")
        assert points in (len(before), len(before) - 1)  # inside a character: that character's
    return joined


def test_streamed_bytes_and_text_of_random_tokens_are_those_of_the_whole(
    embedded: Tokenizer, vocabulary: Vocabulary
) -> None:
    for token_ids in random_ids(COUNT, vocabulary.size):
        completion = CompletionText([], include_stop=False)
        deltas = [completion.push(vocabulary.token_bytes(token_id)) for token_id in token_ids]
        deltas.append(completion.flush())
        joined = b"".join(token.bytes for delta in deltas for token in delta.placed)
        text = "".join(delta.text for delta in deltas)
        assert text == joined.decode(errors="replace") == embedded.decode(token_ids, skip_special_tokens=True)
        assert completion.byte_count == len(joined)


def test_random_tokens_given_have_the_same_bytes_as_drawn(vocabulary: Vocabulary) -> None:
    reader = reader_of(vocabulary)
    for token_ids in random_ids(COUNT, vocabulary.size):
        rules = Rules()
        given = reader.alone(rules, "input", pb.Input(token_ids=pb.TokenIds(ids=token_ids)))
        rules.done()
        assert check_offsets(given) == b"".join(map(vocabulary.token_bytes, token_ids))
        assert not given.text_changed


def check_texts(vocabulary: Vocabulary, texts: Sequence[str], seen: Callable[[str, tuple[int, ...]], bytes]) -> int:
    """Checks texts whose bytes, as the model saw them, `seen` tells of text and ids; counts the changed ones."""
    reader, changed = reader_of(vocabulary), 0
    for text in texts:
        given = reader.alone(Rules(), "input", pb.Input(text=text, add_special_tokens=False))
        joined = check_offsets(given)
        assert joined == seen(text, tuple(given.token_ids)), repr(text)
        assert given.text_changed == (joined != text.encode()), repr(text)
        changed += given.text_changed
    return changed


def test_random_texts_keep_their_bytes_or_say_that_they_changed(embedded: Tokenizer, vocabulary: Vocabulary) -> None:
    def decoded(text: str, token_ids: tuple[int, ...]) -> bytes:
        whole = embedded.decode(token_ids, skip_special_tokens=False)
        # Where a dropped byte leaves half a character, only its bytes can tell.
        return b"".join(map(vocabulary.spelled, token_ids)) if "\N{REPLACEMENT CHARACTER}" in whole else whole.encode()

    changed = check_texts(vocabulary, list(random_texts(COUNT)), decoded)
    assert COUNT // 100 < changed < COUNT * 9 // 10


def test_texts_of_bytes_that_the_embedded_tokenizer_has_never_change(vocabulary: Vocabulary) -> None:
    known = {byte for i in range(vocabulary.size) for byte in vocabulary.token_bytes(i)}
    for text in random_texts(COUNT, seed=2):
        encoding = vocabulary.encode(text, False)
        assert encoding.text_changed == (not set(text.encode()) <= known)


def test_a_normalising_tokenizer_tells_what_it_made_of_random_texts() -> None:
    normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer = tiny_tokenizers.byte_level(normalizer=normalizer)
    own = Vocabulary(tokenizer, size=tokenizer.get_vocab_size())

    def normalised(text: str, token_ids: tuple[int, ...]) -> bytes:
        return normalizer.normalize_str(text).encode().replace(b"\x00", b"")  # the byte it has no token for

    assert 0 < check_texts(own, list(random_texts(FEWER)), normalised) < FEWER


def test_a_tokenizer_with_byte_fallback_keeps_random_texts_but_for_its_own_space() -> None:
    tokenizer = tiny_tokenizers.byte_fallback()
    own = Vocabulary(tokenizer, size=tokenizer.get_vocab_size())

    def with_spaces(text: str, token_ids: tuple[int, ...]) -> bytes:
        return text.replace("▁", " ").encode()

    assert 0 < check_texts(own, list(random_texts(FEWER)), with_spaces) < FEWER


def test_a_word_piece_tokenizer_tells_what_it_kept_of_random_texts() -> None:
    tokenizer = tiny_tokenizers.word_piece()
    own = Vocabulary(tokenizer, size=tokenizer.get_vocab_size())

    def words(text: str, token_ids: tuple[int, ...]) -> bytes:
        pieces = [tokenizer.id_to_token(token_id) for token_id in token_ids]
        spelled = ["" if piece == "[UNK]" else piece[2:] if piece.startswith("##") else f" {piece}" for piece in pieces]
        whole = "".join(spelled)
        if whole != text and spelled:  # the space before the first word is the text's own or was added
            whole = spelled[0].removeprefix(" ") + "".join(spelled[1:])
        return whole.encode()

    texts = [*random_texts(FEWER), "the horse", "horse the", ""]
    assert 0 < check_texts(own, texts, words) < len(texts)
