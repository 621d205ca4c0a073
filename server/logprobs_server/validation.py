"""From a request to what it asks for, or to every rule it breaks. Pure: no gRPC, no torch, nothing runs here.

Inputs and options are read elsewhere; here are the rules between them, and what a request costs. A rule and its message
sit together. What this server does not do yet is refused by the name of its field.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import accumulate

from google.protobuf.message import Message
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
from logprobs_server.inputs import InputReader
from logprobs_server.options import DEFAULT_MAX_TOKENS, OptionReader
from logprobs_server.requests import GeneratePlan, GivenText, Limits, ScorePlan
from logprobs_server.rules import Rules, check_ids, unknown_parts
from logprobs_server.text.vocabulary import Vocabulary

__all__ = ["Validator"]

_TOKEN_OVERHEAD = 96
_ALTERNATIVE_OVERHEAD = 20
_SEQUENCE_OVERHEAD = 64
"""Upper bounds of the encoded size, in bytes, of a Token, an Alternative, a ScoredSequence without what they hold."""
_ANSWER_OVERHEAD = 1024
"""What an answer holds besides: model, usage, the lengths of its fields."""


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
        self._inputs = InputReader(vocabulary, model)
        self._options = OptionReader(model, limits)
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
        options = self._options.logprobs(rules, "logprobs", request.logprobs)
        limit = self._limits.continuations
        count = len(request.continuations)
        rules.check(count <= limit, "continuations", f"{count} are more than this server's {limit}")
        context = self._inputs.alone(rules, "context", request.context)
        pairs = [
            self._inputs.pair(rules, f"continuations[{i}]", request.context, context, continuation)
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

    def generate(self, request: pb.GenerateRequest, received_s: float) -> GeneratePlan:
        """What a GenerateRequest asks for that was received then, by `time.monotonic`.

        Raises:
            InvalidRequestError: every rule it breaks.
        """
        rules = self._start(request)
        max_tokens = request.max_tokens if request.HasField("max_tokens") else DEFAULT_MAX_TOKENS
        count, draws = self._counts(rules, request, max_tokens)
        rules.check(max_tokens >= 0, "max_tokens", f"{max_tokens} is below 0")
        if max_tokens == 0:
            rules.check(
                request.HasField("prompt_logprobs"),
                "max_tokens",
                "0 generates nothing and needs prompt_logprobs",
            )
        rules.unsupported(request.HasField("beam_search"), "beam_search")
        sampling = self._options.sampling(rules, request.sampling, draws)
        stopping = self._options.stopping(rules, request.stopping, max_tokens, received_s)
        self._leaves_some(rules, sampling, stopping)
        ranking = self._options.ranking(rules, request.ranking)
        options = self._options.logprobs(rules, "logprobs", request.logprobs)
        wants_prompt = request.HasField("prompt_logprobs")
        prompt_options = self._options.logprobs(rules, "prompt_logprobs", request.prompt_logprobs)
        prompt = self._inputs.prompt(rules, request.prompt, generates=max_tokens != 0)
        rules.done()
        tokens, longest = len(prompt.token_ids), self._model.context_length
        job = GenerateJob(
            prompt=tuple(prompt.token_ids),
            max_tokens=max_tokens,
            completion_count=draws,
            sampling=sampling,
            stopping=stopping,
            logprobs=options,
            prompt_logprobs=prompt_options if wants_prompt else None,
        )
        self._cost(rules, "logprobs", draws * min(max_tokens, longest - tokens), options)
        self._cost(rules, "prompt_logprobs", tokens, prompt_options)
        self._fits(rules, "prompt", job)
        rules.done()
        return GeneratePlan(job=job, prompt=prompt, completion_count=count, ranking=ranking)

    def tokenize(self, request: pb.TokenizeRequest) -> GivenText:
        """The tokens of a TokenizeRequest's input.

        Raises:
            InvalidRequestError: every rule it breaks.
        """
        rules = self._start(request)
        text = self._inputs.alone(rules, "input", request.input)
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
        check_ids(rules, "token_ids", request.token_ids, self._model.vocabulary_size)
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

    def _start(self, request: Message) -> Rules:
        """Refuses fields and enum values that this server does not know: nothing is ever ignored."""
        rules = Rules()
        for unknown in unknown_parts(request):
            rules.broken(unknown.field, unknown.description)
        rules.done()
        return rules

    def _counts(self, rules: Rules, request: pb.GenerateRequest, max_tokens: int) -> tuple[int, int]:
        """How many completions are returned, and how many are drawn."""
        count = request.completion_count if request.HasField("completion_count") else 1
        draws = request.best_of if request.HasField("best_of") else count
        limit = self._limits.completion_count
        rules.check(1 <= count <= limit, "completion_count", f"{count} is outside [1, {limit}]")
        rules.check(draws >= count, "best_of", f"{draws} is below completion_count, {count}")
        rules.check(draws <= max(count, limit), "best_of", f"{draws} is above this server's {limit}")
        if max_tokens == 0:
            field, most = ("best_of", draws) if draws > count else ("completion_count", count)
            rules.check(most == 1, field, f"max_tokens 0 goes with one completion, not {most}")
        return count, draws

    def _leaves_some(self, rules: Rules, sampling: SamplingOptions, stopping: StoppingOptions) -> None:
        """At every step there must be a token to draw."""
        masked = {token_id for token_id, bias in sampling.logit_bias if bias == -math.inf}
        if stopping.min_tokens:
            masked.update(stopping.token_ids, () if stopping.ignore_eos else self._model.eos_token_ids)
        size = self._model.vocabulary_size
        rules.check(
            len(masked) < size, "sampling.logit_bias", f"with min_tokens masks all {size} tokens; none is left to draw"
        )

    def _cost(self, rules: Rules, field: str, positions: int, options: LogprobOptions) -> None:
        each, limit = options.top_count + len(options.token_ids), self._limits.alternatives
        rules.check(
            positions * each <= limit,
            field,
            f"{positions} positions with {each} alternatives each are more than this server's {limit:,} alternatives",
        )

    def _size(self, rules: Rules, field: str, payload: int) -> None:
        size, limit = _ANSWER_OVERHEAD + payload, self._limits.response_bytes
        rules.check(size <= limit, field, f"the answer could need {size:,} bytes; this server's limit is {limit:,}")

    def _size_bound(self, tokens: int, options: LogprobOptions) -> int:
        """Bytes that this many tokens cannot pass."""
        named = sum(len(self._vocabulary.spelled(i)) for i in options.token_ids)
        alternatives = options.top_count + len(options.token_ids)
        spelled = self._spelling_bound[1] + self._spelling_bound[min(options.top_count, len(self._spelling_bound) - 1)]
        return tokens * (_TOKEN_OVERHEAD + _ALTERNATIVE_OVERHEAD * alternatives + named + spelled)

    def _fits(self, rules: Rules, field: str, job: Job) -> None:
        if not rules.num_broken and (reason := self._unfit(job)) is not None:
            rules.broken(field, reason)


def _common_prefix(sequences: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    shortest, longest = min(sequences), max(sequences)
    length = next((i for i, (a, b) in enumerate(zip(shortest, longest, strict=False)) if a != b), len(shortest))
    return shortest[:length]
