"""Builds the contract's messages from engine events. No torch, no gRPC, no policy but how streams are cut."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain, islice
from typing import TypeVar

from logprobs.v1 import logprobs_pb2 as pb

from logprobs_server.engine.events import (
    CompletionDecoded,
    CompletionFinished,
    DecodedToken,
    Event,
    FinishReason,
    JobStarted,
    PositionLogprobs,
    PromptScored,
)
from logprobs_server.engine.types import ModelDescription
from logprobs_server.options import DEFAULT_MAX_TOKENS, DEFAULT_SAMPLING, default_beam_search
from logprobs_server.requests import GeneratePlan, GivenText, Limits
from logprobs_server.text.vocabulary import Vocabulary

__all__ = ["GenerateMessages", "MessageBuilder", "parts"]

_M = TypeVar("_M", pb.Token, pb.GenerateResponse)
_REASONS = {
    FinishReason.END_OF_SEQUENCE: pb.FINISH_REASON_END_OF_SEQUENCE,
    FinishReason.STOP_STRING: pb.FINISH_REASON_STOP_STRING,
    FinishReason.STOP_TOKEN: pb.FINISH_REASON_STOP_TOKEN,
    FinishReason.MAX_TOKENS: pb.FINISH_REASON_MAX_TOKENS,
    FinishReason.CONTEXT_FULL: pb.FINISH_REASON_CONTEXT_FULL,
    FinishReason.TIME_LIMIT: pb.FINISH_REASON_TIME_LIMIT,
}


class MessageBuilder:
    """Builds the messages that need the vocabulary or the model's description."""

    def __init__(
        self, vocabulary: Vocabulary, model: ModelDescription, limits: Limits, has_chat_template: bool
    ) -> None:
        self._vocabulary = vocabulary
        self._model = model
        self._limits = limits
        self._has_chat_template = has_chat_template
        self._spellings, self._special_tokens = vocabulary.all_token_bytes, vocabulary.special_tokens

    @property
    def response_bytes(self) -> int:
        """Size that a message must not pass."""
        return self._limits.response_bytes

    def identity(self) -> pb.ModelIdentity:
        """Which model answers."""
        model = self._model
        return pb.ModelIdentity(
            name=model.name, revision=model.revision, dtype=model.dtype, batch_invariant=model.batch_invariant
        )

    def model(self) -> pb.GetModelResponse:
        """The model, its limits and the defaults."""
        limits = self._limits
        return pb.GetModelResponse(
            model=self.identity(),
            vocabulary_size=self._model.vocabulary_size,
            context_length=self._model.context_length,
            defaults=pb.Defaults(
                max_tokens=DEFAULT_MAX_TOKENS,
                sampling=DEFAULT_SAMPLING,
                beam_search=default_beam_search(limits),
                stopping=pb.Stopping(min_tokens=0),
                ranking=pb.Ranking(criterion=pb.RANKING_CRITERION_MEAN_LOGPROB, length_exponent=1),
            ),
            limits=pb.Limits(
                top_count=limits.top_count,
                completion_count=limits.completion_count,
                beam_count=limits.beam_count,
                stop_strings=limits.stop_strings,
                continuations=limits.continuations,
                alternatives=limits.alternatives,
                request_bytes=limits.request_bytes,
                response_bytes=limits.response_bytes,
            ),
            eos_token_ids=self._model.eos_token_ids,
            bos_token_id=self._model.bos_token_id,
            has_chat_template=self._has_chat_template,
            tokenizer_revision=self._vocabulary.revision,
            allows_full_distribution=limits.full_distribution,
        )

    def tokenized(self, text: GivenText) -> pb.TokenizeResponse:
        """Tokens of an input, without logprobs."""
        response = pb.TokenizeResponse(text_changed=text.text_changed)
        for index in range(len(text.token_ids)):
            self.given_token(response.tokens.add(), text, index, None, ())
        return response

    def detokenized(self, token_ids: Sequence[int], keep_special: bool) -> pb.DetokenizeResponse:
        """The text of some tokens."""
        spell = self._vocabulary.spelled if keep_special else self._vocabulary.token_bytes
        joined = b"".join(spell(token_id) for token_id in token_ids)
        return pb.DetokenizeResponse(bytes=joined, text=joined.decode("utf-8", "replace"))

    def given_token(
        self,
        token: pb.Token,
        text: GivenText,
        index: int,
        position: PositionLogprobs | None,
        named_ids: Sequence[int],
    ) -> pb.Token:
        """Makes an empty token one that the caller gave; without a position nothing precedes it. Returns it."""
        self._fill(token, position or PositionLogprobs(token_id=text.token_ids[index]), named_ids)
        token.bytes = text.pieces[index]
        token.byte_offset = text.byte_offsets[index]
        token.code_point_offset = text.code_point_offsets[index]
        return token

    def drawn_token(self, token: pb.Token, drawn: DecodedToken, named_ids: Sequence[int]) -> None:
        """Makes an empty token one that was generated."""
        self._fill(token, drawn.position, named_ids)
        token.bytes = drawn.bytes
        token.sampling_logprob = drawn.sampling_logprob
        token.sampling_set_size = drawn.sampling_set_size
        token.byte_offset = drawn.byte_offset
        token.code_point_offset = drawn.code_point_offset
        token.trimmed = drawn.trimmed

    def _fill(self, token: pb.Token, position: PositionLogprobs, named_ids: Sequence[int]) -> None:
        token_id = position.token_id
        assert token_id is not None
        token.id = token_id
        if token_id in self._special_tokens:
            token.special, token.special_name = True, self._special_tokens[token_id]
        if position.logprob is not None and position.rank is not None:
            token.logprob, token.rank = position.logprob, position.rank
        self.tell_distribution(token, position, named_ids)

    def tell_distribution(
        self, to: pb.Token | pb.NextToken, position: PositionLogprobs, named_ids: Sequence[int]
    ) -> None:
        """Adds all but a whole distribution. It is written where it stays: put into another, a message is encoded and
        decoded to get there."""
        if position.top_ids:
            self._add(to.top.add, position.top_ids, position.top_logprobs)
        if position.named_logprobs:  # where there is no distribution there are none, whatever was named
            self._add(to.named.add, named_ids, position.named_logprobs)
        if position.tail_logprob is not None:
            to.tail_logprob = position.tail_logprob
        if position.entropy is not None:
            to.entropy = position.entropy

    def _add(self, add: Callable[..., pb.Alternative], ids: Sequence[int], logprobs: Sequence[float]) -> None:
        for token_id, logprob in zip(ids, logprobs, strict=True):
            added = add()  # field by field: named arguments are looked up by name, and took a third more
            added.id, added.bytes, added.logprob = token_id, self._spellings[token_id], logprob
            if token_id in self._special_tokens:
                added.special_name = self._special_tokens[token_id]


class GenerateMessages:
    """Turns the events of a GenerateJob into the messages of its stream.

    Events that waited together travel together: at most one TokensDecoded for all of them, unless it grew too large.
    Where only the best of what is drawn are told, they wait until all is drawn, but for beam search, whose first
    completions are its best.
    """

    def __init__(self, builder: MessageBuilder, plan: GeneratePlan) -> None:
        self._builder = builder
        self._plan = plan
        self._held: list[CompletionDecoded] = []
        self._finished: dict[int, CompletionFinished] = {}
        self._prompt_told = 0

    def push(self, events: Sequence[Event]) -> Iterable[pb.GenerateResponse]:
        """Messages for the next events, in the contract's order. The first is built now: a step gives one. Others are
        built when they are asked for, and hold nobody up."""
        if len(events) == 1 and not self._plan.holds:  # what a step gives most streams, and cheaply
            event = events[0]
            if isinstance(event, CompletionDecoded) and len(event.tokens) == 1:
                return (self._piece(event.index, event.tokens[0], event.text),)
        messages = self._messages(events)
        return chain(list(islice(messages, 1)), messages)

    def _messages(self, events: Sequence[Event]) -> Iterator[pb.GenerateResponse]:
        for event in events:
            if isinstance(event, JobStarted):
                yield self._started(event)
                if self._plan.job.prompt_logprobs is not None:
                    yield from self._prompt([None])
            elif isinstance(event, PromptScored):
                yield from self._prompt(event.positions)
        decoded = [event for event in events if isinstance(event, CompletionDecoded)]
        finished = [event for event in events if isinstance(event, CompletionFinished)]
        self._finished |= {event.index: event for event in finished}
        ended = bool(finished) and len(self._finished) == self._plan.job.completion_count
        if self._plan.holds:
            self._held += decoded
            if ended:
                yield from self._winners()
        else:
            yield from self._decoded(decoded)
            yield from (self._finish(event) for event in finished if event.index < self._plan.completion_count)
        if ended and len(self._finished) > 1:
            yield self._ranked()

    def _winners(self) -> Iterator[pb.GenerateResponse]:
        """The best of what was drawn, each whole, best first."""
        for index, _ in self._order()[: self._plan.completion_count]:
            yield from self._decoded([event for event in self._held if event.index == index])
            yield self._finish(self._finished[index])

    def _order(self) -> list[tuple[int, float]]:
        """Every completion with what it is ranked by, best first."""
        ranking = self._plan.ranking
        values = {i: ranking.value(e.logprob, e.token_count) for i, e in self._finished.items()}
        return sorted(values.items(), key=lambda place: (-place[1], place[0]))

    def _started(self, event: JobStarted) -> pb.GenerateResponse:
        job = self._plan.job
        return pb.GenerateResponse(
            started=pb.GenerationStarted(
                model=self._builder.identity(),
                seed=None if job.beams else job.sampling.seed,
                prompt_token_count=len(job.prompt),
                cached_token_count=event.cached_token_count,
                completion_count=self._plan.completion_count,
            )
        )

    def _prompt(self, positions: Sequence[PositionLogprobs | None]) -> Iterator[pb.GenerateResponse]:
        options, text = self._plan.job.prompt_logprobs, self._plan.prompt
        assert options is not None
        first, self._prompt_told = self._prompt_told, self._prompt_told + len(positions)
        tokens = [
            self._builder.given_token(pb.Token(), text, first + i, position, options.token_ids)
            for i, position in enumerate(positions)
        ]
        for part in parts(tokens, self._builder.response_bytes):
            yield pb.GenerateResponse(prompt_scored=pb.PromptScored(tokens=part, text_changed=text.text_changed))

    def _decoded(self, events: Sequence[CompletionDecoded]) -> Iterator[pb.GenerateResponse]:
        pieces = (piece for event in events for piece in self._pieces(event))
        for response, *others in parts(pieces, self._builder.response_bytes):
            deltas = {delta.completion: delta for delta in response.decoded.deltas}
            for delta in chain.from_iterable(other.decoded.deltas for other in others):
                if delta.completion in deltas:
                    deltas[delta.completion].text += delta.text
                    deltas[delta.completion].tokens.MergeFrom(delta.tokens)
                else:
                    deltas[delta.completion] = response.decoded.deltas.add()
                    deltas[delta.completion].CopyFrom(delta)
            yield response

    def _pieces(self, event: CompletionDecoded) -> Iterator[pb.GenerateResponse]:
        """What became certain in messages of at most one token each; the last has the text."""
        tokens: Sequence[DecodedToken | None] = event.tokens or (None,)
        for token in tokens:
            yield self._piece(event.index, token, event.text if token is tokens[-1] else "")

    def _piece(self, completion: int, token: DecodedToken | None, text: str) -> pb.GenerateResponse:
        response = pb.GenerateResponse()
        delta = response.decoded.deltas.add()
        delta.completion, delta.text = completion, text
        if token is not None:
            self._builder.drawn_token(delta.tokens.add(), token, self._plan.job.logprobs.token_ids)
        return response

    def _finish(self, event: CompletionFinished) -> pb.GenerateResponse:
        finished = pb.CompletionFinished(completion=event.index, reason=_REASONS[event.reason], totals=_totals(event))
        if event.stop_string is not None:
            finished.stop_string = event.stop_string
        if event.stop_token_id is not None:
            finished.stop_token_id = event.stop_token_id
        return pb.GenerateResponse(finished=finished)

    def _ranked(self) -> pb.GenerateResponse:
        return pb.GenerateResponse(
            ranked=pb.CompletionsRanked(
                completions=[
                    pb.RankedCompletion(completion=index, value=value, totals=_totals(self._finished[index]))
                    for index, value in self._order()
                ],
                criterion=pb.RankingCriterion.ValueType(self._plan.ranking.criterion.value),
            )
        )


def _totals(event: CompletionFinished) -> pb.Totals:
    return pb.Totals(
        token_count=event.token_count,
        byte_count=event.byte_count,
        logprob=event.logprob,
        sampling_logprob=event.sampling_logprob,
    )


def parts(messages: Iterable[_M], limit: int) -> Iterator[list[_M]]:
    """Cuts messages into lists that each stay well below `limit` bytes, unless a single one does not."""
    part: list[_M] = []
    size = 0
    for message in messages:
        message_size = message.ByteSize() + 8
        if part and size + message_size > limit // 2:
            yield part
            part, size = [], 0
        part.append(message)
        size += message_size
    if part:
        yield part
