"""From a request to what it asks for, or to every rule it breaks. Pure: no gRPC, no torch, nothing runs here.

Inputs and options are read elsewhere; here are the rules between them, and what a request costs. A rule and its message
sit together.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from google.protobuf.message import Message
from logprobs.v1 import logprobs_pb2 as pb

from logprobs_server.costs import Costs
from logprobs_server.engine.types import (
    GenerateJob,
    Job,
    LogprobOptions,
    ModelDescription,
    SamplingOptions,
    StoppingOptions,
)
from logprobs_server.errors import InvalidRequestError, shown
from logprobs_server.inputs import InputReader
from logprobs_server.options import DEFAULT_MAX_TOKENS, OptionReader
from logprobs_server.requests import MAX_ITEM_ID_BYTES, GeneratePlan, GivenText, Limits, ScorePlan
from logprobs_server.rules import Rules, check_ids, unknown_parts
from logprobs_server.scoring import ScoreReader
from logprobs_server.text.conversation import Render
from logprobs_server.text.vocabulary import Vocabulary

__all__ = ["Validator"]


class Validator:
    """Knows the model, its vocabulary and the limits, and turns requests into plans.

    render: the model's template for conversations; None if it has none.
    unfit: tells why the engine could never do a job, None if it can.
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        model: ModelDescription,
        limits: Limits,
        render: Render | None,
        unfit: Callable[[Job], str | None],
    ) -> None:
        self._vocabulary = vocabulary
        self._model = model
        self._limits = limits
        self._unfit = unfit
        self._inputs = InputReader(vocabulary, model, render)
        self._options = OptionReader(model, limits)
        self._costs = Costs(vocabulary, limits)
        self._scores = ScoreReader(self._inputs, self._options, self._costs, model, limits)

    def score(self, request: pb.ScoreRequest) -> ScorePlan:
        """What a ScoreRequest asks for.

        Raises:
            InvalidRequestError: every rule it breaks.
        """
        return self._score(self._start(request), request, streamed=False)

    def score_item(self, request: pb.ScoreStreamRequest) -> ScorePlan:
        """What a request of a stream asks for.

        Raises:
            InvalidRequestError: every rule it breaks.
        """
        rules = self._start(request)
        size = len(request.id.encode())
        description = f"{shown(request.id)} has {size} bytes, outside [1, {MAX_ITEM_ID_BYTES}]"
        rules.check(1 <= size <= MAX_ITEM_ID_BYTES, "id", description)
        try:
            plan = self._score(Rules(), request.request, streamed=True)
        except InvalidRequestError as error:
            rules.adopt("request.", error)
            raise rules.error() from error
        rules.done()
        return plan

    def _score(self, rules: Rules, request: pb.ScoreRequest, *, streamed: bool) -> ScorePlan:
        plan = self._scores.plan(rules, request, streamed=streamed)
        for job in plan.jobs:
            self._fits(rules, "context", job)
        rules.done()
        return plan

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
        sampling = self._options.sampling(rules, request.sampling, draws)
        stopping = self._options.stopping(rules, request.stopping, max_tokens, received_s)
        beams = None
        if request.HasField("beam_search"):
            draws, beams = self._options.beams(rules, request, count, stopping)
        else:
            self._leaves_some(rules, sampling, stopping)
        ranking = self._options.ranking(rules, request.ranking, beams)
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
            beams=beams,
        )
        self._check_alternatives(rules, "logprobs", draws * min(max_tokens, longest - tokens), options)
        self._check_alternatives(rules, "prompt_logprobs", tokens, prompt_options)
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
        bound = self._costs.size_bound(len(text.token_ids), LogprobOptions()) + text.byte_count
        self._costs.check_size(rules, "input", bound)
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
        self._costs.check_size(rules, "token_ids", 4 * sum(len(self._vocabulary.spelled(i)) for i in request.token_ids))
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
        if request.HasField("beam_search"):
            rules.check(not request.HasField("best_of"), "best_of", "does not go with beam_search")
            rules.check(max_tokens != 0, "max_tokens", "0 generates nothing and does not go with beam_search")
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
        helped = " with min_tokens" if stopping.min_tokens else ""
        rules.check(len(masked) < size, "sampling.logit_bias", f"masks all {size} tokens{helped}; none is left to draw")

    def _check_alternatives(self, rules: Rules, field: str, positions: int, options: LogprobOptions) -> None:
        self._costs.check_alternatives(rules, field, positions, options.top_count + len(options.token_ids))

    def _fits(self, rules: Rules, field: str, job: Job) -> None:
        if not rules.num_broken and (reason := self._unfit(job)) is not None:
            rules.broken(field, reason)
