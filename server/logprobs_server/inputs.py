"""From the inputs of a request to the tokens they stand for, or to the rules they break."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

from logprobs.v1 import logprobs_pb2 as pb

from logprobs_server.engine.types import ModelDescription
from logprobs_server.requests import GivenText
from logprobs_server.rules import NOT_YET, Rules, check_ids
from logprobs_server.text.offsets import code_point_offsets
from logprobs_server.text.vocabulary import Vocabulary

__all__ = ["InputReader"]


class InputReader:
    """Knows the model and its vocabulary, and turns inputs into tokens."""

    def __init__(self, vocabulary: Vocabulary, model: ModelDescription) -> None:
        self._vocabulary = vocabulary
        self._model = model

    def alone(self, rules: Rules, field: str, given: pb.Input) -> GivenText:
        """The tokens of an input by itself; an empty one if rules are broken."""
        match given.WhichOneof("form"):
            case "text":
                special = given.add_special_tokens if given.HasField("add_special_tokens") else True
                encoding = self._vocabulary.encode(given.text, special)
                return _given(encoding.token_ids, encoding.pieces, text_changed=encoding.text_changed)
            case "token_ids":
                before = rules.num_broken
                if given.HasField("add_special_tokens"):
                    rules.broken(f"{field}.add_special_tokens", "is only for text")
                check_ids(rules, f"{field}.token_ids.ids", given.token_ids.ids, self._model.vocabulary_size)
                ids = tuple(given.token_ids.ids) if rules.num_broken == before else ()
                return _given(ids, [self._vocabulary.token_bytes(i) for i in ids], text_changed=False)
            case "conversation":
                rules.broken(f"{field}.conversation", NOT_YET)
            case _:
                rules.broken(field, "one of text, token_ids, conversation must be set")
        return _given((), (), text_changed=False)

    def prompt(self, rules: Rules, given: pb.Input, *, generates: bool) -> GivenText:
        """The tokens of a prompt, which must be some and leave room for one more if something is generated."""
        before = rules.num_broken
        prompt = self.alone(rules, "prompt", given)
        tokens, longest = len(prompt.token_ids), self._model.context_length
        if rules.num_broken == before:
            rules.check(tokens > 0, "prompt", "has no tokens, and the tokenizer adds none")
            rules.check(
                tokens <= longest - generates,
                "prompt",
                f"has {tokens} tokens and leaves no room to generate; the model's context holds {longest}",
            )
        return prompt

    def pair(
        self, rules: Rules, field: str, context: pb.Input, alone: GivenText, continuation: pb.Input
    ) -> tuple[GivenText, tuple[int, ...]]:
        """The scored tokens of a continuation, and all tokens up to its end."""
        form = continuation.WhichOneof("form")
        if form == "conversation":
            rules.broken(f"{field}.conversation", "a conversation cannot be a continuation")
            return alone, ()
        if form == "text" and continuation.add_special_tokens:
            rules.broken(f"{field}.add_special_tokens", "a continuation gets no special tokens")
            return alone, ()
        if form == "text" and context.WhichOneof("form") == "text":
            special = context.add_special_tokens if context.HasField("add_special_tokens") else True
            pair = self._vocabulary.encode_pair(context.text, continuation.text, special)
            whole = _given(pair.token_ids, pair.pieces, text_changed=pair.text_changed)
            return _tail(whole, pair.first_scored, pair.context_byte_count), tuple(pair.token_ids)
        if form == "text":
            encoding = self._vocabulary.encode(continuation.text, False)
            own = _given(encoding.token_ids, encoding.pieces, text_changed=encoding.text_changed)
        else:
            own = self.alone(rules, field, continuation)
        whole = _given(
            (*alone.token_ids, *own.token_ids),
            (*alone.pieces, *own.pieces),
            text_changed=alone.text_changed or own.text_changed,
        )
        return _tail(whole, len(alone.token_ids), alone.byte_count), tuple(whole.token_ids)


def _given(ids: Sequence[int], pieces: Sequence[bytes], *, text_changed: bool) -> GivenText:
    ends = list(accumulate((len(piece) for piece in pieces), initial=0))
    return GivenText(
        token_ids=ids,
        pieces=pieces,
        byte_offsets=ends[:-1],
        code_point_offsets=code_point_offsets(pieces),
        first=0,
        byte_count=ends[-1],
        text_changed=text_changed,
    )


def _tail(whole: GivenText, first: int, context_byte_count: int) -> GivenText:
    """The tokens from `first` on, with offsets from where the context's bytes end."""
    points = _code_points_before(whole, context_byte_count)
    return GivenText(
        token_ids=whole.token_ids[first:],
        pieces=whole.pieces[first:],
        byte_offsets=[offset - context_byte_count for offset in whole.byte_offsets[first:]],
        code_point_offsets=[offset - points for offset in whole.code_point_offsets[first:]],
        first=first,
        byte_count=whole.byte_count - context_byte_count,
        text_changed=whole.text_changed,
    )


def _code_points_before(whole: GivenText, byte_count: int) -> int:
    """Code points that start in the first `byte_count` bytes."""
    return len(b"".join(whole.pieces)[:byte_count].decode("utf-8", "replace"))
