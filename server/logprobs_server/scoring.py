"""From a ScoreRequest to the jobs it asks for, or to every rule it breaks. Pure; a part of validation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from logprobs.v1 import logprobs_pb2 as pb

from logprobs_server.costs import ANSWER_OVERHEAD, FLOAT_BYTES, SEQUENCE_OVERHEAD, Costs
from logprobs_server.engine.types import LogprobOptions, ModelDescription
from logprobs_server.inputs import InputReader, nothing
from logprobs_server.options import OptionReader
from logprobs_server.requests import GivenText, Limits, ScorePlan, Scoring
from logprobs_server.rules import Rules
from logprobs_server.windows import Windows, common_prefix, scoring_of

__all__ = ["ScoreReader"]

_MAX_TOKENISED_BYTES = 64 << 20
"""Contexts' text that may be tokenised for one request: each continuation is tokenised together with its context."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Sequences:
    """Whole sequences, where each is scored from, and how a rule names them."""

    wholes: Sequence[tuple[int, ...]]
    firsts: Sequence[int]
    fields: Sequence[str]
    what: str

    def scoring(self, windows: Windows, options: LogprobOptions, next_options: LogprobOptions | None) -> Scoring:
        """The jobs that score them."""
        return scoring_of(self.wholes, self.firsts, windows, options, next_options)

    def token_count(self) -> int:
        """Tokens in all, what all contexts start with counted once."""
        contexts = [whole[:first] for whole, first in zip(self.wholes, self.firsts, strict=True)]
        shared = len(common_prefix(contexts))
        return shared + sum(len(whole) - shared for whole in self.wholes)


class ScoreReader:
    """Knows the model and the limits, and turns ScoreRequests into plans."""

    def __init__(
        self, inputs: InputReader, options: OptionReader, costs: Costs, model: ModelDescription, limits: Limits
    ) -> None:
        self._inputs = inputs
        self._options = options
        self._costs = costs
        self._model = model
        self._limits = limits

    def plan(self, rules: Rules, request: pb.ScoreRequest, *, streamed: bool) -> ScorePlan:
        """What a request asks for.

        Args:
            streamed: the answer may come in several messages.
        Raises:
            InvalidRequestError: every rule it breaks.
        """
        windows = self._windows(rules, request)
        options = self._options.logprobs(rules, "logprobs", request.logprobs)
        self._check_full_distribution(rules, request)
        texts, own = self._own(rules, request)
        neutral = self._neutral(rules, request)
        rules.done()
        after = _after(neutral, texts, own) if neutral.token_ids else None
        for sequences in filter(None, (own, after)):
            self._check_lengths(rules, request, windows, sequences)
        rules.done()
        told = LogprobOptions() if request.totals_only else options
        following = replace(options, full=request.full_distribution) if request.next_token else None
        size_bound, in_parts = self._check_answer(rules, request, texts, options, streamed)
        rules.done()
        return ScorePlan(
            own=own.scoring(windows, told, following),
            neutral=after.scoring(windows, LogprobOptions(), None) if after else None,
            texts=tuple(texts),
            logprobs=options,
            totals_only=request.totals_only,
            input_token_count=own.token_count() + len(neutral.token_ids),
            size_bound=size_bound,
            in_parts=in_parts,
        )

    def _windows(self, rules: Rules, request: pb.ScoreRequest) -> Windows:
        longest = self._model.context_length
        stride = request.roll_stride if request.HasField("roll_stride") else longest // 2
        if request.long_input == pb.LONG_INPUT_ROLL:
            rules.check(1 <= stride < longest, "roll_stride", f"{stride} is outside [1, {longest - 1}]")
        elif request.HasField("roll_stride"):
            rules.broken("roll_stride", "is only for LONG_INPUT_ROLL")
        return Windows(length=longest, stride=stride)

    def _check_full_distribution(self, rules: Rules, request: pb.ScoreRequest) -> None:
        if request.full_distribution:
            rules.check(self._limits.full_distribution, "full_distribution", "is not allowed by this server")
            rules.check(request.next_token, "full_distribution", "is that of the next token and needs next_token")

    def _own(self, rules: Rules, request: pb.ScoreRequest) -> tuple[list[GivenText], _Sequences]:
        """The scored texts, and the sequences they end."""
        limit, count = self._limits.continuations, len(request.continuations)
        rules.check(count <= limit, "continuations", f"{count} are more than this server's {limit}")
        context = self._context(rules, request)
        if not count:
            whole = tuple(context.token_ids)
            return [context], _Sequences(wholes=[whole], firsts=[0], fields=["context"], what="")
        fields = [f"continuations[{i}]" for i in range(min(count, limit))]
        pairs = [
            self._inputs.pair(rules, field, context, continuation)
            for field, continuation in zip(fields, request.continuations, strict=False)
        ]
        texts = [text for text, _ in pairs]
        firsts = [text.first for text in texts]
        wholes = [whole for _, whole in pairs]
        return texts, _Sequences(wholes=wholes, firsts=firsts, fields=fields, what="with its context ")

    def _context(self, rules: Rules, request: pb.ScoreRequest) -> GivenText:
        """The context by itself; an empty one if it could only be refused with each of its continuations."""
        count, longest = len(request.continuations), self._model.context_length
        context = self._inputs.alone(rules, "context", request.context, goes_on=count > 0)
        tokens, size = len(context.token_ids), count * context.byte_count
        if tokens > longest and request.long_input != pb.LONG_INPUT_ROLL:
            rules.broken("context", f"has {tokens} tokens; the model's context holds {longest}")
            return nothing()
        if size > _MAX_TOKENISED_BYTES and context.source is not None:
            what = f"{count} with a context of {context.byte_count:,} bytes each"
            rules.broken("continuations", f"{what} are more than the {_MAX_TOKENISED_BYTES:,} bytes tokenised at once")
            return nothing()
        return context

    def _neutral(self, rules: Rules, request: pb.ScoreRequest) -> GivenText:
        """The neutral context; no tokens if there is none."""
        if not request.HasField("neutral_context"):
            return nothing()
        field, before = "neutral_context", rules.num_broken
        neutral = self._inputs.alone(rules, field, request.neutral_context, goes_on=True)
        rules.check(len(request.continuations) > 0, field, "needs continuations to be scored after it")
        if rules.num_broken == before:
            rules.check(len(neutral.token_ids) > 0, field, "has no tokens, and the tokenizer adds none")
        return neutral

    def _check_lengths(self, rules: Rules, request: pb.ScoreRequest, windows: Windows, sequences: _Sequences) -> None:
        longest, limit = self._model.context_length, self._limits.continuations
        lengths = [len(whole) for whole in sequences.wholes]
        if request.long_input == pb.LONG_INPUT_ROLL:
            count = sum(map(windows.count, lengths, sequences.firsts))
            rules.check(
                count <= limit, "roll_stride", f"{windows.stride} makes {count} windows; this server's limit is {limit}"
            )
            return
        for field, length in zip(sequences.fields, lengths, strict=True):
            description = f"{sequences.what}has {length} tokens; the model's context holds {longest}"
            rules.check(length <= longest, field, description)

    def _check_answer(
        self,
        rules: Rules,
        request: pb.ScoreRequest,
        texts: Sequence[GivenText],
        options: LogprobOptions,
        streamed: bool,
    ) -> tuple[int, bool]:
        """Bytes that the answer cannot pass, with tokens held but not told; whether it may take several messages."""
        tokens, following = sum(len(text.token_ids) for text in texts), len(texts) if request.next_token else 0
        told = following if request.totals_only else following + tokens
        self._costs.check_alternatives(rules, "logprobs", told, options.top_count + len(options.token_ids))
        vocabulary = self._model.vocabulary_size if request.full_distribution else 0
        self._costs.check_alternatives(rules, "full_distribution", following, vocabulary)
        last = SEQUENCE_OVERHEAD * len(texts) + self._costs.size_bound(following, options)
        whole = last + self._costs.size_bound(told - following, options) + FLOAT_BYTES * following * vocabulary
        self._costs.check_size(rules, "logprobs", last if streamed else whole)
        held = self._costs.size_bound(tokens, LogprobOptions()) if request.totals_only else 0
        return ANSWER_OVERHEAD + whole + held, ANSWER_OVERHEAD + whole > self._limits.response_bytes


def _after(neutral: GivenText, texts: Sequence[GivenText], own: _Sequences) -> _Sequences:
    """The scored tokens after the neutral context; one that nothing precedes in its own sequence is not scored here."""
    count = len(neutral.token_ids)
    return _Sequences(
        wholes=[(*neutral.token_ids, *text.token_ids) for text in texts],
        firsts=[count + (text.first == 0 and len(text.token_ids) > 0) for text in texts],
        fields=own.fields,
        what="with the neutral context ",
    )
