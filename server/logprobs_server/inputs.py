"""From the inputs of a request to the tokens they stand for, or to the rules they break."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

from logprobs.v1 import logprobs_pb2 as pb

from logprobs_server.engine.types import ModelDescription
from logprobs_server.requests import GivenText, InputText
from logprobs_server.rules import Rules, check_ids
from logprobs_server.text.conversation import ConversationEnd, Render, TemplateRefusedError, rendered
from logprobs_server.text.offsets import code_point_offsets
from logprobs_server.text.vocabulary import Vocabulary

__all__ = ["InputReader", "nothing"]


_MAX_SHOWN_REASON = 200


class InputReader:
    """Knows the model, its vocabulary and its template, and turns inputs into tokens."""

    def __init__(self, vocabulary: Vocabulary, model: ModelDescription, render: Render | None) -> None:
        self._vocabulary = vocabulary
        self._model = model
        self._render = render

    def alone(self, rules: Rules, field: str, given: pb.Input, *, goes_on: bool = False) -> GivenText:
        """The tokens of an input by itself; an empty one if rules are broken.

        Args:
            goes_on: something follows the input, so a conversation ends where the assistant is to speak by default.
        """
        form = given.WhichOneof("form")
        if form is None:
            rules.broken(field, "one of text, token_ids, conversation must be set")
        if form != "text" and given.HasField("add_special_tokens"):
            rules.broken(f"{field}.add_special_tokens", "is only for text")
        match form:
            case "text":
                special = given.add_special_tokens if given.HasField("add_special_tokens") else True
                return self._encoded(InputText(text=given.text, add_special_tokens=special))
            case "conversation":
                source = self._rendered(rules, f"{field}.conversation", given.conversation, goes_on)
                return nothing() if source is None else self._encoded(source)
            case "token_ids":
                before = rules.num_broken
                check_ids(rules, f"{field}.token_ids.ids", given.token_ids.ids, self._model.vocabulary_size)
                if rules.num_broken == before:
                    ids = tuple(given.token_ids.ids)
                    return _given(ids, [self._vocabulary.token_bytes(i) for i in ids], text_changed=False)
        return nothing()

    def prompt(self, rules: Rules, given: pb.Input, *, generates: bool) -> GivenText:
        """The tokens of a prompt, which must be some and leave room for one more if something is generated."""
        before = rules.num_broken
        prompt = self.alone(rules, "prompt", given, goes_on=True)
        tokens, longest = len(prompt.token_ids), self._model.context_length
        if rules.num_broken == before:
            rules.check(tokens > 0, "prompt", "has no tokens, and the tokenizer adds none")
            no_room = " and leaves no room to generate" if generates else ""
            description = f"has {tokens} tokens{no_room}; the model's context holds {longest}"
            rules.check(tokens <= longest - generates, "prompt", description)
        return prompt

    def pair(
        self, rules: Rules, field: str, context: GivenText, continuation: pb.Input
    ) -> tuple[GivenText, tuple[int, ...]]:
        """The scored tokens of a continuation, and all tokens up to its end."""
        form, source = continuation.WhichOneof("form"), context.source
        if form == "conversation":
            rules.broken(f"{field}.conversation", "a conversation cannot be a continuation")
            return nothing(), ()
        if form == "text" and continuation.add_special_tokens:
            rules.broken(f"{field}.add_special_tokens", "a continuation gets no special tokens")
            return nothing(), ()
        if form == "text" and source is not None:
            pair = self._vocabulary.encode_pair(source.text, continuation.text, source.add_special_tokens, source.plain)
            whole = _given(pair.token_ids, pair.pieces, text_changed=pair.text_changed)
            return _tail(whole, pair.first_scored, pair.context_byte_count), tuple(pair.token_ids)
        if form == "text":
            own = self._encoded(InputText(text=continuation.text, add_special_tokens=False))
        else:
            own = self.alone(rules, field, continuation)
        whole = _given(
            (*context.token_ids, *own.token_ids),
            (*context.pieces, *own.pieces),
            text_changed=context.text_changed or own.text_changed,
        )
        return _tail(whole, len(context.token_ids), context.byte_count), tuple(whole.token_ids)

    def _encoded(self, source: InputText) -> GivenText:
        encoding = self._vocabulary.encode(source.text, source.add_special_tokens, source.plain)
        return _given(encoding.token_ids, encoding.pieces, text_changed=encoding.text_changed, source=source)

    def _rendered(self, rules: Rules, field: str, given: pb.Conversation, goes_on: bool) -> InputText | None:
        """A conversation as text; None if rules are broken."""
        before = rules.num_broken
        render = self._render
        rules.check(len(given.messages) > 0, f"{field}.messages", "has no message")
        for i, message in enumerate(given.messages):
            rules.check(message.role != "", f"{field}.messages[{i}].role", "is empty")
        if render is None:
            rules.broken(field, "the model has no chat template")
        if render is None or rules.num_broken > before:
            return None
        default = ConversationEnd.ASSISTANT_HEADER if goes_on else ConversationEnd.CLOSED
        end = ConversationEnd(given.end) if given.end else default
        messages = [(message.role, message.content) for message in given.messages]
        try:
            text = rendered(render, messages, end, self._vocabulary.special_tokens.values())
        except TemplateRefusedError as error:
            rules.broken(field, f"the model's chat template refuses it: {str(error)[:_MAX_SHOWN_REASON]}")
            return None
        return InputText(text=text.text, add_special_tokens=False, plain=text.plain)


def nothing() -> GivenText:
    """No tokens."""
    return _given((), (), text_changed=False)


def _given(
    ids: Sequence[int], pieces: Sequence[bytes], *, text_changed: bool, source: InputText | None = None
) -> GivenText:
    ends = list(accumulate((len(piece) for piece in pieces), initial=0))
    return GivenText(
        token_ids=ids,
        pieces=pieces,
        byte_offsets=ends[:-1],
        code_point_offsets=code_point_offsets(pieces),
        first=0,
        byte_count=ends[-1],
        text_changed=text_changed,
        source=source,
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
