"""From a request to what it asks for, or to every rule it breaks. Pure: no gRPC, no torch, nothing runs here.

A rule and its message sit together. What this server does not do yet is refused by the name of its field.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from typing import Any

from google.protobuf.message import Message
from google.protobuf.unknown_fields import UnknownFieldSet
from logprobs.v1 import logprobs_pb2 as pb

from logprobs_server.engine.types import (
    Continuation,
    GenerateJob,
    Job,
    LogprobOptions,
    ModelDescription,
    SamplingOptions,
    ScoreJob,
    StoppingOptions,
)
from logprobs_server.errors import MAX_VIOLATIONS, InvalidRequestError, Violation, shown
from logprobs_server.requests import GeneratePlan, GivenText, Limits, RankingCriterion, RankingPlan, ScorePlan
from logprobs_server.text.offsets import code_point_offsets
from logprobs_server.text.vocabulary import Vocabulary

__all__ = ["DEFAULT_MAX_TOKENS", "DEFAULT_SAMPLING", "Validator"]

DEFAULT_MAX_TOKENS = 256
DEFAULT_SAMPLING = pb.Sampling(
    temperature=1,
    top_k=0,
    top_p=1,
    min_p=0,
    typical_p=1,
    repetition_penalty=1,
    presence_penalty=0,
    frequency_penalty=0,
)
_NOT_YET = "is not supported by this server yet"
_MAX_SEED = 2**53 - 1
_MAX_STOP_BYTES = 1024
_MAX_STOP_TOKENS = 64
_TOKEN_OVERHEAD = 96
_ALTERNATIVE_OVERHEAD = 20
_SEQUENCE_OVERHEAD = 64
"""Upper bounds of the encoded size, in bytes, of a Token, an Alternative, a ScoredSequence without what they hold."""
_ANSWER_OVERHEAD = 1024
"""What an answer holds besides: model, usage, the lengths of its fields."""


class _Rules:
    """Collects the first rules that a request breaks, and counts the others."""

    def __init__(self) -> None:
        self._violations: list[Violation] = []
        self.num_broken = 0

    def broken(self, field: str, description: str) -> None:
        """One more broken rule."""
        self.num_broken += 1
        if len(self._violations) < MAX_VIOLATIONS:
            self._violations.append(Violation(field, description))

    def check(self, holds: bool, field: str, description: str) -> bool:
        """Notes the rule as broken unless it holds; returns whether it does."""
        if not holds:
            self.broken(field, description)
        return holds

    def unsupported(self, present: bool, field: str) -> None:
        """Refuses a field that is set and not built yet."""
        self.check(not present, field, _NOT_YET)

    def done(self) -> None:
        """Ends the checks.

        Raises:
            InvalidRequestError: rules were broken.
        """
        if self.num_broken:
            raise InvalidRequestError(self._violations, self.num_broken - len(self._violations))


class Validator:
    """Knows the model, its vocabulary and the limits, and turns requests into plans.

    unfit: tells why the engine could never do a job, None if it can.
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        model: ModelDescription,
        limits: Limits,
        unfit: Callable[[Job], str | None],
    ) -> None:
        self._vocabulary = vocabulary
        self._model = model
        self._limits = limits
        self._unfit = unfit
        lengths = (len(vocabulary.spelled(i)) + len(vocabulary.special_name(i)) for i in range(model.vocabulary_size))
        longest = sorted(lengths, reverse=True)[: 2 * limits.top_count]
        self._spelling_bound = [0, *accumulate(longest)]

    def score(self, request: pb.ScoreRequest) -> ScorePlan:
        """What a ScoreRequest asks for.

        Raises:
            InvalidRequestError: every rule it breaks.
        """
        rules = self._start(request)
        rules.unsupported(request.HasField("neutral_context"), "neutral_context")
        rules.unsupported(request.long_input == pb.LONG_INPUT_ROLL, "long_input")
        if request.long_input != pb.LONG_INPUT_ROLL and request.HasField("roll_stride"):
            rules.broken("roll_stride", "is only for LONG_INPUT_ROLL")
        options = self._logprob_options(rules, "logprobs", request.logprobs)
        limit = self._limits.continuations
        count = len(request.continuations)
        rules.check(count <= limit, "continuations", f"{count} are more than this server's {limit}")
        context = self._input(rules, "context", request.context)
        pairs = [
            self._pair(rules, f"continuations[{i}]", request.context, context, continuation)
            for i, continuation in enumerate(request.continuations[:limit])
        ]
        texts = [text for text, _ in pairs] if count else [context]
        wholes = [whole for _, whole in pairs] if count else [tuple(context.token_ids)]
        longest = self._model.context_length
        for i, whole in enumerate(wholes):
            field = f"continuations[{i}]" if count else "context"
            what = "with its context " if count else ""
            rules.check(
                len(whole) <= longest,
                field,
                f"{what}has {len(whole)} tokens; the model's context holds {longest}",
            )
        rules.done()
        prefix = _common_prefix([whole[: text.first] for whole, text in zip(wholes, texts, strict=True)])
        job = ScoreJob(
            prefix=prefix,
            continuations=tuple(
                Continuation(token_ids=whole[len(prefix) :], scored_from=text.first - len(prefix))
                for whole, text in zip(wholes, texts, strict=True)
            ),
            logprobs=options,
            next_token=request.next_token,
        )
        tokens, following = sum(len(text.token_ids) for text in texts), len(texts) if request.next_token else 0
        self._cost(rules, "logprobs", tokens + following, options)
        told = following if request.totals_only else tokens + following
        self._size(rules, "logprobs", _SEQUENCE_OVERHEAD * len(texts) + self._size_bound(told, options))
        self._fits(rules, "context", job)
        rules.done()
        return ScorePlan(job=job, texts=tuple(texts), totals_only=request.totals_only)

    def generate(self, request: pb.GenerateRequest) -> GeneratePlan:
        """What a GenerateRequest asks for.

        Raises:
            InvalidRequestError: every rule it breaks.
        """
        rules = self._start(request)
        max_tokens = request.max_tokens if request.HasField("max_tokens") else DEFAULT_MAX_TOKENS
        count = request.completion_count if request.HasField("completion_count") else 1
        limit = self._limits.completion_count
        rules.check(1 <= count <= limit, "completion_count", f"{count} is outside [1, {limit}]")
        if request.HasField("best_of") and request.best_of != count:
            known = request.best_of < count
            rules.broken("best_of", f"{request.best_of} is below completion_count, {count}" if known else _NOT_YET)
        rules.check(max_tokens >= 0, "max_tokens", f"{max_tokens} is below 0")
        if max_tokens == 0:
            rules.check(
                request.HasField("prompt_logprobs"),
                "max_tokens",
                "0 generates nothing and needs prompt_logprobs",
            )
            rules.check(count == 1, "completion_count", f"max_tokens 0 goes with one completion, not {count}")
        rules.unsupported(request.HasField("beam_search"), "beam_search")
        sampling = self._sampling(rules, request.sampling, count)
        stopping = self._stopping(rules, request.stopping, max_tokens)
        ranking = self._ranking(rules, request.ranking)
        options = self._logprob_options(rules, "logprobs", request.logprobs)
        wants_prompt = request.HasField("prompt_logprobs")
        prompt_options = self._logprob_options(rules, "prompt_logprobs", request.prompt_logprobs)
        prompt = self._prompt(rules, request.prompt, generates=max_tokens != 0)
        rules.done()
        tokens, longest = len(prompt.token_ids), self._model.context_length
        job = GenerateJob(
            prompt=tuple(prompt.token_ids),
            max_tokens=max_tokens,
            completion_count=count,
            sampling=sampling,
            stopping=stopping,
            logprobs=options,
            prompt_logprobs=prompt_options if wants_prompt else None,
        )
        self._cost(rules, "logprobs", count * min(max_tokens, longest - tokens), options)
        self._cost(rules, "prompt_logprobs", tokens, prompt_options)
        self._fits(rules, "prompt", job)
        rules.done()
        return GeneratePlan(job=job, prompt=prompt, ranking=ranking)

    def tokenize(self, request: pb.TokenizeRequest) -> GivenText:
        """The tokens of a TokenizeRequest's input.

        Raises:
            InvalidRequestError: every rule it breaks.
        """
        rules = self._start(request)
        text = self._input(rules, "input", request.input)
        rules.done()
        self._size(rules, "input", self._size_bound(len(text.token_ids), LogprobOptions()) + text.byte_count)
        rules.done()
        return text

    def detokenize(self, request: pb.DetokenizeRequest) -> tuple[int, ...]:
        """The token ids of a DetokenizeRequest.

        Raises:
            InvalidRequestError: every rule it breaks.
        """
        rules = self._start(request)
        self._ids(rules, "token_ids", request.token_ids)
        rules.done()
        # Each byte comes as itself and as text, where a broken one takes three.
        self._size(rules, "token_ids", 4 * sum(len(self._vocabulary.spelled(i)) for i in request.token_ids))
        rules.done()
        return tuple(request.token_ids)

    def model(self, request: pb.GetModelRequest) -> None:
        """Checks a GetModelRequest.

        Raises:
            InvalidRequestError: every rule it breaks.
        """
        self._start(request)

    def _start(self, request: Message) -> _Rules:
        """Refuses fields and enum values that this server does not know: nothing is ever ignored."""
        rules = _Rules()
        for unknown in unknown_parts(request):
            rules.broken(unknown.field, unknown.description)
        rules.done()
        return rules

    def _ids(self, rules: _Rules, field: str, ids: Sequence[int]) -> None:
        size = self._model.vocabulary_size
        for i, token_id in enumerate(ids):
            if not 0 <= token_id < size:
                rules.broken(f"{field}[{i}]", f"{token_id} is outside the vocabulary, [0, {size - 1}]")

    def _input(self, rules: _Rules, field: str, given: pb.Input) -> GivenText:
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
                self._ids(rules, f"{field}.token_ids.ids", given.token_ids.ids)
                ids = tuple(given.token_ids.ids) if rules.num_broken == before else ()
                return _given(ids, [self._vocabulary.token_bytes(i) for i in ids], text_changed=False)
            case "conversation":
                rules.broken(f"{field}.conversation", _NOT_YET)
            case _:
                rules.broken(field, "one of text, token_ids, conversation must be set")
        return _given((), (), text_changed=False)

    def _prompt(self, rules: _Rules, given: pb.Input, *, generates: bool) -> GivenText:
        """The tokens of a prompt, which must be some and leave room for one more if something is generated."""
        before = rules.num_broken
        prompt = self._input(rules, "prompt", given)
        tokens, longest = len(prompt.token_ids), self._model.context_length
        if rules.num_broken == before:
            rules.check(tokens > 0, "prompt", "has no tokens, and the tokenizer adds none")
            rules.check(
                tokens <= longest - generates,
                "prompt",
                f"has {tokens} tokens and leaves no room to generate; the model's context holds {longest}",
            )
        return prompt

    def _pair(
        self, rules: _Rules, field: str, context: pb.Input, alone: GivenText, continuation: pb.Input
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
            own = self._input(rules, field, continuation)
        whole = _given(
            (*alone.token_ids, *own.token_ids),
            (*alone.pieces, *own.pieces),
            text_changed=alone.text_changed or own.text_changed,
        )
        return _tail(whole, len(alone.token_ids), alone.byte_count), tuple(whole.token_ids)

    def _logprob_options(self, rules: _Rules, field: str, options: pb.LogprobOptions) -> LogprobOptions:
        limit = self._limits.top_count
        top = options.top_count
        rules.check(0 <= top <= limit, f"{field}.top_count", f"{top} is outside [0, {limit}]")
        vocabulary = self._model.vocabulary_size
        rules.check(top <= vocabulary, f"{field}.top_count", f"{top} is above the vocabulary's size, {vocabulary}")
        named = len(options.token_ids)
        rules.check(named <= limit, f"{field}.token_ids", f"{named} are more than this server's {limit}")
        self._ids(rules, f"{field}.token_ids", options.token_ids)
        return LogprobOptions(top_count=top, token_ids=tuple(options.token_ids), entropy=options.entropy)

    def _sampling(self, rules: _Rules, given: pb.Sampling, count: int) -> SamplingOptions:
        def value(name: str) -> float:
            return getattr(given if given.HasField(name) else DEFAULT_SAMPLING, name)  # type: ignore[no-any-return, arg-type]

        temperature, top_k, top_p, min_p = (
            value("temperature"),
            int(value("top_k")),
            value("top_p"),
            value("min_p"),
        )
        rules.check(
            math.isfinite(temperature) and temperature >= 0,
            "sampling.temperature",
            f"{temperature:g} is no finite number of at least 0",
        )
        rules.check(top_k >= 0, "sampling.top_k", f"{top_k} is below 0")
        rules.check(0 < top_p <= 1, "sampling.top_p", f"{top_p:g} is outside (0, 1]")
        rules.check(0 <= min_p <= 1, "sampling.min_p", f"{min_p:g} is outside [0, 1]")
        for name in ("typical_p", "repetition_penalty", "presence_penalty", "frequency_penalty"):
            rules.unsupported(value(name) != getattr(DEFAULT_SAMPLING, name), f"sampling.{name}")
        rules.unsupported(bool(given.logit_bias), "sampling.logit_bias")
        seed = given.seed if given.HasField("seed") else secrets.randbelow(2**32)
        last = _MAX_SEED - max(count, 1) + 1
        rules.check(0 <= seed <= last, "sampling.seed", f"{seed} is outside [0, {last}]")
        return SamplingOptions(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, seed=seed)

    def _stopping(self, rules: _Rules, given: pb.Stopping, max_tokens: int) -> StoppingOptions:
        limit = self._limits.stop_strings
        strings = tuple(given.strings)
        rules.check(len(strings) <= limit, "stopping.strings", f"{len(strings)} are more than this server's {limit}")
        for i, string in enumerate(strings[:limit]):
            size = len(string.encode())
            rules.check(
                1 <= size <= _MAX_STOP_BYTES,
                f"stopping.strings[{i}]",
                f"{shown(string)} has {size} bytes, outside [1, {_MAX_STOP_BYTES}]",
            )
        tokens = len(given.token_ids)
        rules.check(tokens <= _MAX_STOP_TOKENS, "stopping.token_ids", f"{tokens} are more than {_MAX_STOP_TOKENS}")
        self._ids(rules, "stopping.token_ids", given.token_ids)
        least = given.min_tokens
        rules.check(
            0 <= least <= max(max_tokens, 0),
            "stopping.min_tokens",
            f"{least} is outside [0, max_tokens = {max_tokens}]",
        )
        rules.unsupported(given.HasField("time_limit"), "stopping.time_limit")
        return StoppingOptions(
            strings=strings,
            token_ids=tuple(given.token_ids),
            include=given.include,
            min_tokens=least,
            ignore_eos=given.ignore_eos,
        )

    def _ranking(self, rules: _Rules, given: pb.Ranking) -> RankingPlan:
        if given.criterion == pb.RANKING_CRITERION_BEAM_SCORE:
            rules.broken("ranking.criterion", "RANKING_CRITERION_BEAM_SCORE is only for beam search")
            return RankingPlan()
        criterion = RankingCriterion(given.criterion or pb.RANKING_CRITERION_MEAN_LOGPROB)
        if not given.HasField("length_exponent"):
            return RankingPlan(criterion=criterion)
        exponent = given.length_exponent
        field = "ranking.length_exponent"
        rules.check(
            criterion is RankingCriterion.LENGTH_NORMALIZED,
            field,
            "is only for RANKING_CRITERION_LENGTH_NORMALIZED",
        )
        rules.check(math.isfinite(exponent) and abs(exponent) <= 10, field, f"{exponent:g} is outside [-10, 10]")
        return RankingPlan(criterion=criterion, length_exponent=exponent)

    def _cost(self, rules: _Rules, field: str, positions: int, options: LogprobOptions) -> None:
        each, limit = options.top_count + len(options.token_ids), self._limits.alternatives
        rules.check(
            positions * each <= limit,
            field,
            f"{positions} positions with {each} alternatives each are more than this server's {limit:,} alternatives",
        )

    def _size(self, rules: _Rules, field: str, payload: int) -> None:
        size, limit = _ANSWER_OVERHEAD + payload, self._limits.response_bytes
        rules.check(size <= limit, field, f"the answer could need {size:,} bytes; this server's limit is {limit:,}")

    def _size_bound(self, tokens: int, options: LogprobOptions) -> int:
        """Bytes that this many tokens cannot pass."""
        named = sum(len(self._vocabulary.spelled(i)) for i in options.token_ids)
        alternatives = options.top_count + len(options.token_ids)
        spelled = self._spelling_bound[1] + self._spelling_bound[min(options.top_count, len(self._spelling_bound) - 1)]
        return tokens * (_TOKEN_OVERHEAD + _ALTERNATIVE_OVERHEAD * alternatives + named + spelled)

    def _fits(self, rules: _Rules, field: str, job: Job) -> None:
        if not rules.num_broken and (reason := self._unfit(job)) is not None:
            rules.broken(field, reason)


def unknown_parts(message: Message, path: str = "") -> Iterator[Violation]:
    """Fields and enum values, at any depth, that the contract compiled in here does not have."""
    for unknown in UnknownFieldSet(message):  # type: ignore[attr-defined]
        yield Violation(f"{path}{unknown.field_number}", "a field with this number is not known to this server")
    for field, value in message.ListFields():
        name = f"{path}{field.name}"
        if field.message_type is not None:
            if field.message_type.GetOptions().map_entry:
                continue  # the contract's maps hold scalars
            for place, inner in _places(name, value, field.is_repeated):
                yield from unknown_parts(inner, f"{place}.")
        elif field.enum_type is not None:
            for place, number in _places(name, value, field.is_repeated):
                if number not in field.enum_type.values_by_number:
                    yield Violation(place, f"{number} is no value of {field.enum_type.name} known to this server")


def _places(name: str, value: Any, repeated: bool) -> list[tuple[str, Any]]:
    return [(f"{name}[{i}]", item) for i, item in enumerate(value)] if repeated else [(name, value)]


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


def _common_prefix(sequences: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    shortest, longest = min(sequences), max(sequences)
    length = next((i for i, (a, b) in enumerate(zip(shortest, longest, strict=False)) if a != b), len(shortest))
    return shortest[:length]
