"""From the options of a request to typed values, or to the rules they break. The defaults are here, and only here."""

from __future__ import annotations

import math
import secrets

from google.protobuf.duration_pb2 import Duration
from logprobs.v1 import logprobs_pb2 as pb

from logprobs_server.engine.types import (
    BeamOptions,
    EarlyStopping,
    LogprobOptions,
    ModelDescription,
    SamplingOptions,
    StoppingOptions,
)
from logprobs_server.errors import shown, shown_float
from logprobs_server.requests import Limits, RankingCriterion, RankingPlan
from logprobs_server.rules import Rules, check_id, check_ids

__all__ = ["DEFAULT_MAX_TOKENS", "DEFAULT_SAMPLING", "OptionReader", "default_beam_search"]

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
_DEFAULT_BEAMS = 4
_EARLY_STOPPING = {
    pb.EARLY_STOPPING_HEURISTIC: EarlyStopping.HEURISTIC,
    pb.EARLY_STOPPING_WHEN_FULL: EarlyStopping.WHEN_FULL,
    pb.EARLY_STOPPING_NEVER: EarlyStopping.NEVER,
}
_MAX_SEED = 2**53 - 1
_MAX_STOP_BYTES = 1024
_MAX_STOP_TOKENS = 64
_MAX_SECONDS = 315_576_000_000
"""10,000 years, the most that google.protobuf.Duration allows."""


def default_beam_search(limits: Limits) -> pb.BeamSearch:
    """How beams are searched where a request leaves it open."""
    return pb.BeamSearch(
        beam_count=min(_DEFAULT_BEAMS, limits.beam_count),
        length_penalty=1,
        early_stopping=pb.EARLY_STOPPING_HEURISTIC,
    )


class OptionReader:
    """Knows the model and the limits, and turns options into typed values."""

    def __init__(self, model: ModelDescription, limits: Limits) -> None:
        self._model = model
        self._limits = limits

    def logprobs(self, rules: Rules, field: str, options: pb.LogprobOptions) -> LogprobOptions:
        """What is told of positions."""
        limit = self._limits.top_count
        top = options.top_count
        rules.check(0 <= top <= limit, f"{field}.top_count", f"{top} is outside [0, {limit}]")
        vocabulary = self._model.vocabulary_size
        rules.check(top <= vocabulary, f"{field}.top_count", f"{top} is above the vocabulary's size, {vocabulary}")
        named = len(options.token_ids)
        rules.check(named <= limit, f"{field}.token_ids", f"{named} are more than this server's {limit}")
        check_ids(rules, f"{field}.token_ids", options.token_ids, self._model.vocabulary_size)
        return LogprobOptions(top_count=top, token_ids=tuple(options.token_ids), entropy=options.entropy)

    def sampling(self, rules: Rules, given: pb.Sampling, count: int) -> SamplingOptions:
        """How `count` completions are drawn; the seed too if the request gives none."""
        chosen = pb.Sampling()
        chosen.CopyFrom(DEFAULT_SAMPLING)
        chosen.MergeFrom(given)
        _check_scalars(rules, chosen)
        biases = sorted(given.logit_bias.items())
        for token_id, bias in biases:
            check_id(rules, f"sampling.logit_bias[{token_id}]", token_id, self._model.vocabulary_size)
            if not (math.isfinite(bias) or bias == -math.inf):
                rules.broken(f"sampling.logit_bias[{token_id}]", f"{bias:g} is neither finite nor -inf")
        seed = given.seed if given.HasField("seed") else secrets.randbelow(2**32)
        last = _MAX_SEED - max(count, 1) + 1
        rules.check(0 <= seed <= last, "sampling.seed", f"{seed} is outside [0, {last}]")
        return SamplingOptions(
            temperature=chosen.temperature,
            top_k=chosen.top_k,
            top_p=chosen.top_p,
            min_p=chosen.min_p,
            typical_p=chosen.typical_p,
            repetition_penalty=chosen.repetition_penalty,
            presence_penalty=chosen.presence_penalty,
            frequency_penalty=chosen.frequency_penalty,
            logit_bias=tuple((token_id, bias) for token_id, bias in biases if bias != 0),
            seed=seed,
        )

    def beams(
        self, rules: Rules, request: pb.GenerateRequest, count: int, stopping: StoppingOptions
    ) -> tuple[int, BeamOptions]:
        """How many beams a request that returns `count` completions searches with, and how."""
        chosen = default_beam_search(self._limits)
        chosen.MergeFrom(request.beam_search)
        beams, penalty, limit = chosen.beam_count, chosen.length_penalty, self._limits.beam_count
        field = "beam_search.beam_count"
        if rules.check(1 <= beams <= limit, field, f"{beams} is outside [1, {limit}]"):
            rules.check(beams >= count, field, f"{beams} is below completion_count, {count}")
        # So that there are as many beams after the first token already, whatever that may not be.
        most = self._model.vocabulary_size - len({*stopping.token_ids, *self._model.eos_token_ids})
        rules.check(beams <= max(most, 1), field, f"{beams} is above {most}, the tokens that do not end a completion")
        description = f"{penalty:g} is not finite"
        rules.check(math.isfinite(penalty), "beam_search.length_penalty", description)
        by_score = request.ranking.criterion in (pb.RANKING_CRITERION_UNSPECIFIED, pb.RANKING_CRITERION_BEAM_SCORE)
        early = _EARLY_STOPPING[chosen.early_stopping]
        options = BeamOptions(length_penalty=penalty, early_stopping=early, told=count if by_score else beams)
        return beams, options

    def stopping(self, rules: Rules, given: pb.Stopping, max_tokens: int, received_s: float) -> StoppingOptions:
        """What ends completions of a request that was received then, by `time.monotonic`."""
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
        check_ids(rules, "stopping.token_ids", given.token_ids, self._model.vocabulary_size)
        least = given.min_tokens
        rules.check(
            0 <= least <= max(max_tokens, 0),
            "stopping.min_tokens",
            f"{least} is outside [0, max_tokens = {max_tokens}]",
        )
        deadline_s = received_s + _seconds(rules, given.time_limit) if given.HasField("time_limit") else None
        return StoppingOptions(
            strings=strings,
            token_ids=tuple(given.token_ids),
            include=given.include,
            min_tokens=least,
            ignore_eos=given.ignore_eos,
            deadline_s=deadline_s,
        )

    def ranking(self, rules: Rules, given: pb.Ranking, beams: BeamOptions | None) -> RankingPlan:
        """What completions are ranked by; those of a search by beam score unless it says otherwise."""
        default = pb.RANKING_CRITERION_BEAM_SCORE if beams else pb.RANKING_CRITERION_MEAN_LOGPROB
        criterion = RankingCriterion(given.criterion or default)
        if criterion is RankingCriterion.BEAM_SCORE and not beams:
            rules.broken("ranking.criterion", "RANKING_CRITERION_BEAM_SCORE is only for beam search")
            return RankingPlan()
        if not given.HasField("length_exponent"):
            exponent = beams.length_penalty if beams and criterion is RankingCriterion.BEAM_SCORE else 1.0
            return RankingPlan(criterion=criterion, length_exponent=exponent)
        exponent = given.length_exponent
        field = "ranking.length_exponent"
        rules.check(
            criterion is RankingCriterion.LENGTH_NORMALIZED,
            field,
            "is only for RANKING_CRITERION_LENGTH_NORMALIZED",
        )
        rules.check(abs(exponent) <= 10, field, f"{shown_float(exponent)} is outside [-10, 10]")
        return RankingPlan(criterion=criterion, length_exponent=exponent)


def _seconds(rules: Rules, limit: Duration) -> float:
    seconds, nanos = limit.seconds, limit.nanos
    rules.check(
        0 <= seconds <= _MAX_SECONDS and 0 <= nanos < 10**9 and seconds + nanos > 0,
        "stopping.time_limit",
        f"{seconds} s and {nanos} ns are no duration above 0",
    )
    return seconds + nanos / 1e9


def _check_scalars(rules: Rules, chosen: pb.Sampling) -> None:
    temperature, penalty = chosen.temperature, chosen.repetition_penalty
    rules.check(
        math.isfinite(temperature) and temperature >= 0,
        "sampling.temperature",
        f"{temperature:g} is no finite number of at least 0",
    )
    rules.check(chosen.top_k >= 0, "sampling.top_k", f"{chosen.top_k} is below 0")
    rules.check(0 < chosen.top_p <= 1, "sampling.top_p", f"{shown_float(chosen.top_p)} is outside (0, 1]")
    rules.check(0 <= chosen.min_p <= 1, "sampling.min_p", f"{shown_float(chosen.min_p)} is outside [0, 1]")
    rules.check(0 < chosen.typical_p <= 1, "sampling.typical_p", f"{shown_float(chosen.typical_p)} is outside (0, 1]")
    rules.check(
        math.isfinite(penalty) and penalty > 0,
        "sampling.repetition_penalty",
        f"{penalty:g} is no finite number above 0",
    )
    for name in ("presence_penalty", "frequency_penalty"):
        taken = getattr(chosen, name)
        rules.check(math.isfinite(taken), f"sampling.{name}", f"{taken:g} is not finite")
