"""The model's tokenizer with exact bytes: text to tokens, tokens to bytes.

What a token adds to a text comes from the vocabulary, never from the tokenizer's own decoding or offsets, which
cannot place tokens inside a character. Begin and end of sequence are the model's business, not this module's.
"""

from __future__ import annotations

import hashlib
import json
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import accumulate

import tokenizers

from logprobs_server.text.spelling import Json, Spell, UnsupportedTokenizerError, speller, starts_without_space

__all__ = ["Encoding", "PairEncoding", "Ranges", "UnsupportedTokenizerError", "Vocabulary"]

Ranges = tuple[tuple[int, int], ...]
"""Parts of a text, in characters: each from the first number up to the second."""

_LONG_TEXT = 16 << 10
"""Characters from which on a text is tokenised while other threads run, which gives the interpreter away and takes it
back. A shorter one holds them up for some milliseconds at most; 4 MiB held up all streams for 3 s."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Encoding:
    """A text's tokens.

    pieces: what each token adds to the text, as the model saw it; empty for special and unknown tokens that the text
        does not spell.
    text_changed: the pieces put together are not the text's own bytes.
    """

    token_ids: tuple[int, ...]
    pieces: tuple[bytes, ...]
    text_changed: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class PairEncoding:
    """The tokens of a context and its continuation, tokenised together.

    first_scored: index of the first token that is the continuation's; it may begin inside the context.
    context_byte_count: where the continuation's text starts in the pieces put together.
    """

    token_ids: tuple[int, ...]
    pieces: tuple[bytes, ...]
    text_changed: bool
    first_scored: int
    context_byte_count: int


class Vocabulary:
    """The tokens of one model.

    Ids that the tokenizer does not use (a model's embedding may have padding rows) have no bytes and are not special.
    Methods may be called from any thread.
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer, *, size: int) -> None:
        """Takes the tokenizer over: truncation and padding are switched off in it.

        Args:
            size: the model's number of tokens, at least the tokenizer's.
        Raises:
            UnsupportedTokenizerError: the tokens' exact bytes cannot be known, or the model has fewer tokens.
        """
        tokenizer.no_truncation()
        tokenizer.no_padding()
        serialised = tokenizer.to_str()
        content: Json = json.loads(serialised)
        spell = speller(content)
        if content["model"].get("dropout"):
            raise UnsupportedTokenizerError("the tokenizer draws its merges at random (dropout)")

        self._tokenizer = tokenizer
        self._revision = hashlib.sha256(serialised.encode()).hexdigest()[:16]
        self._special: dict[int, str] = {
            token["id"]: token["content"] for token in content["added_tokens"] if token["special"]
        }
        self._added = frozenset(token["id"] for token in content["added_tokens"])
        self._spellings = _spellings(content, spell, size)
        self._bytes = [b"" if i in self._special else spelling for i, spelling in enumerate(self._spellings)]
        self._unknown_id = self._find_unknown(content["model"])
        self._starts_without_space = starts_without_space(content, spell)
        self._encode_context = lru_cache(maxsize=4)(self.encode)  # continuations share their context

    @property
    def size(self) -> int:
        """The model's number of tokens."""
        return len(self._bytes)

    @property
    def revision(self) -> str:
        """Digest of the tokenizer: 16 hexadecimal digits."""
        return self._revision

    def token_bytes(self, token_id: int) -> bytes:
        """What the token adds to a text; nothing for special tokens."""
        return self._bytes[token_id]

    def spelled(self, token_id: int) -> bytes:
        """The token's bytes, a special one's spelling."""
        return self._spellings[token_id]

    def special_name(self, token_id: int) -> str:
        """How a special token is spelled; empty for others."""
        return self._special.get(token_id, "")

    @property
    def all_token_bytes(self) -> Sequence[bytes]:
        """What each token adds to a text, by id; for those who look up many."""
        return self._bytes

    @property
    def special_tokens(self) -> Mapping[int, str]:
        """How those tokens are spelled that the tokenizer marks as special, by id."""
        return self._special

    def encode(self, text: str, add_special_tokens: bool, plain: Ranges = ()) -> Encoding:
        """The tokens of a text, with those that the tokenizer puts around it if `add_special_tokens`.

        A leading space that the tokenizer adds is taken off the first token of the text.

        Args:
            plain: where the text spells special tokens that are to be ordinary text.
        """
        if not plain:
            return self._encode(self._tokenizer, text, add_special_tokens)
        assert not add_special_tokens
        parts = [self._encode(tokenizer, part, False) for tokenizer, part in self._sections(text, plain) if part]
        return Encoding(
            token_ids=tuple(token_id for part in parts for token_id in part.token_ids),
            pieces=tuple(piece for part in parts for piece in part.pieces),
            text_changed=any(part.text_changed for part in parts),
        )

    def _sections(self, text: str, plain: Ranges) -> Iterator[tuple[tokenizers.Tokenizer, str]]:
        """The text in parts to be tokenised one by one, as tokenizers do with what is between special tokens."""
        found = _encoded(self._tokenizer, text, False)
        own = [ends for i, ends in zip(found.ids, found.offsets, strict=True) if i in self._special]
        special = [ends for ends in own if not _overlaps(ends, plain)]
        starts, stops = [start for start, _ in special], [stop for _, stop in special]
        at = 0
        for first, last in plain:
            start = stops[i - 1] if (i := bisect_right(stops, first)) else 0
            stop = starts[i] if (i := bisect_left(starts, last)) < len(starts) else len(text)
            if start >= at:
                yield self._tokenizer, text[at:start]
                yield self._plain_tokenizer, text[start:stop]
                at = stop
        yield self._tokenizer, text[at:]

    @cached_property
    def _plain_tokenizer(self) -> tokenizers.Tokenizer:
        """The tokenizer without an eye for special tokens."""
        tokenizer = tokenizers.Tokenizer.from_str(self._tokenizer.to_str())
        tokenizer.encode_special_tokens = True
        return tokenizer

    def _encode(self, tokenizer: tokenizers.Tokenizer, text: str, add_special_tokens: bool) -> Encoding:
        encoding = _encoded(tokenizer, text, add_special_tokens)
        ids, around = encoding.ids, encoding.special_tokens_mask
        pieces = [b"" if added else self._spellings[i] for i, added in zip(ids, around, strict=True)]
        if self._unknown_id in ids:
            self._empty_unknown(pieces, encoding, text)
        given = text.encode()
        if b"".join(pieces) != given and self._added_space(text) and 0 in around:
            first = around.index(0)
            if ids[first] not in self._added:
                pieces[first] = pieces[first].removeprefix(b" ")
        return Encoding(token_ids=tuple(ids), pieces=tuple(pieces), text_changed=b"".join(pieces) != given)

    def encode_pair(
        self, context: str, continuation: str, add_special_tokens: bool, plain: Ranges = ()
    ) -> PairEncoding:
        """The tokens of a context and its continuation, tokenised as one text.

        The continuation's are those after the longest common prefix with the context's own tokens, and never fewer than
        those that end behind the context.
        """
        alone = self._encode_context(context, add_special_tokens, plain)
        whole = self.encode(context + continuation, add_special_tokens, plain)
        seen = sum(map(len, alone.pieces)) if whole.text_changed else len(context.encode())
        common = _first(a != b for a, b in zip(alone.token_ids, whole.token_ids, strict=False))
        inside = _first(end > seen for end in accumulate(map(len, whole.pieces)))
        return PairEncoding(
            token_ids=whole.token_ids,
            pieces=whole.pieces,
            text_changed=whole.text_changed,
            first_scored=min(common, inside),
            context_byte_count=seen,
        )

    def _find_unknown(self, model: Json) -> int | None:
        """Id of the token that stands for characters the vocabulary lacks."""
        if "unk_id" in model:
            return model["unk_id"]  # type: ignore[no-any-return]
        name = model.get("unk_token")
        return None if name is None else self._tokenizer.token_to_id(name)

    def _empty_unknown(self, pieces: list[bytes], encoding: tokenizers.Encoding, text: str) -> None:
        """Takes the bytes off unknown tokens, but for those that the text spells."""
        for index, (token_id, (start, end)) in enumerate(zip(encoding.ids, encoding.offsets, strict=True)):
            if token_id == self._unknown_id and text[start:end].strip().encode() != pieces[index]:
                pieces[index] = b""

    def _added_space(self, text: str) -> bool:
        """Whether the tokenizer adds a space before this text."""
        if self._starts_without_space is None:
            return False
        normalizer = self._tokenizer.normalizer
        seen = text if normalizer is None else normalizer.normalize_str(text)
        return not seen.startswith(self._starts_without_space)


def _encoded(tokenizer: tokenizers.Tokenizer, text: str, add_special_tokens: bool) -> tokenizers.Encoding:
    """What the tokenizer makes of a text; of its two methods only that for batches lets other threads run."""
    if len(text) < _LONG_TEXT:
        return tokenizer.encode(text, add_special_tokens=add_special_tokens)
    [encoding] = tokenizer.encode_batch([text], add_special_tokens=add_special_tokens)
    return encoding


def _spellings(content: Json, spell: Spell, size: int) -> list[bytes]:
    """Every token's bytes, special ones spelled out; none for ids without a token."""
    vocabulary = content["model"]["vocab"]
    entries = vocabulary.items() if isinstance(vocabulary, dict) else ((e[0], i) for i, e in enumerate(vocabulary))
    spelled = {token_id: spell(piece) for piece, token_id in entries}
    spelled |= {token["id"]: token["content"].encode() for token in content["added_tokens"]}
    largest = max(spelled, default=-1)
    if largest >= size:
        raise UnsupportedTokenizerError(f"the tokenizer has a token {largest}, the model only {size} tokens")
    return [spelled.get(token_id, b"") for token_id in range(size)]


def _overlaps(ends: tuple[int, int], ranges: Ranges) -> bool:
    """Whether a part of a text shares characters with one of the ranges, which are in order."""
    behind = bisect_left(ranges, (ends[1], 0))
    return behind > 0 and ranges[behind - 1][1] > ends[0]


def _first(conditions: Iterable[bool]) -> int:
    """Index of the first that holds; their number if none does."""
    count = 0
    for holds in conditions:
        if holds:
            break
        count += 1
    return count
