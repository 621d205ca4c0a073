"""Every rule that a request can break: at the bound, on both sides of it, and what the caller is told."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf import duration_pb2
from harness import Served, answer, ids, refusal, running, text
from logprobs.v1 import logprobs_pb2 as pb
from logprobs_server.engine.engine import TorchEngine

CONTEXT, COMPLETIONS, CONTINUATIONS, TOP, ALTERNATIVES = 32, 4, 4, 8, 160
VOCABULARY = 300
LAST_SEED = 2**53 - 1
LONGEST_S = 315_576_000_000
NO_TEMPLATE = "the model has no chat template"
Case = tuple[Any, str, str]


@pytest.fixture(scope="module")
def strict(tiny_folder: Path) -> Iterator[Served]:
    """A server with limits small enough to meet."""
    with running(
        tiny_folder,
        context_length=CONTEXT,
        max_completions=COMPLETIONS,
        max_continuations=CONTINUATIONS,
        max_beams=6,
        max_top_count=TOP,
        max_alternatives=ALTERNATIVES,
    ) as served:
        yield served


def score(context: pb.Input | None = None, *continuations: pb.Input, **fields: Any) -> pb.ScoreRequest:
    """A request that is right but for what is given."""
    return pb.ScoreRequest(context=context or text("ab"), continuations=continuations, **fields)


def rolled(context: pb.Input | None = None, *continuations: pb.Input, **fields: Any) -> pb.ScoreRequest:
    """A request to score in windows."""
    return score(context, *continuations, long_input=pb.LONG_INPUT_ROLL, **fields)


def generate(prompt: pb.Input | None = None, **fields: Any) -> pb.GenerateRequest:
    """A request that is right but for what is given."""
    return pb.GenerateRequest(**{"prompt": prompt or text("ab"), "max_tokens": 2, **fields})


def sampled(**fields: Any) -> pb.GenerateRequest:
    return generate(sampling=pb.Sampling(**fields))


def stopped(**fields: Any) -> pb.GenerateRequest:
    return generate(stopping=pb.Stopping(**fields))


def beams(**fields: Any) -> pb.GenerateRequest:
    return generate(beam_search=pb.BeamSearch(**fields))


def duration(seconds: int = 0, nanos: int = 0) -> duration_pb2.Duration:
    return duration_pb2.Duration(seconds=seconds, nanos=nanos)


def ranked(criterion: pb.RankingCriterion.ValueType, **fields: Any) -> pb.GenerateRequest:
    return generate(ranking=pb.Ranking(criterion=criterion, **fields))


def options(**fields: Any) -> pb.LogprobOptions:
    return pb.LogprobOptions(**fields)


MEAN, TOTAL, NORMALIZED, BEAM = (
    pb.RANKING_CRITERION_MEAN_LOGPROB,
    pb.RANKING_CRITERION_TOTAL_LOGPROB,
    pb.RANKING_CRITERION_LENGTH_NORMALIZED,
    pb.RANKING_CRITERION_BEAM_SCORE,
)
CHAT = pb.Input(conversation=pb.Conversation(messages=[pb.ChatMessage(role="user", content="hi")]))
SPECIAL_IDS = pb.Input(token_ids=pb.TokenIds(ids=[1]), add_special_tokens=False)
EMPTY = pb.Input()

REFUSED: dict[str, Case] = {
    # inputs
    "context unset": (pb.ScoreRequest(), "context", "one of text, token_ids, conversation must be set"),
    "context without a form": (score(EMPTY), "context", "must be set"),
    "continuation without a form": (score(text("a"), EMPTY), "continuations[0]", "must be set"),
    "prompt unset": (pb.GenerateRequest(), "prompt", "must be set"),
    "input unset": (pb.TokenizeRequest(), "input", "must be set"),
    "context: special tokens for ids": (score(SPECIAL_IDS), "context.add_special_tokens", "only for text"),
    "prompt: special tokens for ids": (generate(SPECIAL_IDS), "prompt.add_special_tokens", "only for text"),
    "input: special tokens for ids": (
        pb.TokenizeRequest(input=SPECIAL_IDS),
        "input.add_special_tokens",
        "only for text",
    ),
    "continuation: special tokens for ids": (
        score(text("a"), SPECIAL_IDS),
        "continuations[0].add_special_tokens",
        "only for text",
    ),
    "continuation: special tokens": (
        score(text("a"), pb.Input(text="b", add_special_tokens=True)),
        "continuations[0].add_special_tokens",
        "a continuation gets no special tokens",
    ),
    "context id below the vocabulary": (score(ids([5, -1])), "context.token_ids.ids[1]", "-1 is outside"),
    "context id above the vocabulary": (score(ids([300])), "context.token_ids.ids[0]", "300 is outside"),
    "continuation id above the vocabulary": (
        score(text("a"), text("b"), ids([1, 300])),
        "continuations[1].token_ids.ids[1]",
        "300 is outside the vocabulary, [0, 299]",
    ),
    "prompt id above the vocabulary": (generate(ids([300])), "prompt.token_ids.ids[0]", "300 is outside"),
    "input id above the vocabulary": (
        pb.TokenizeRequest(input=ids([300])),
        "input.token_ids.ids[0]",
        "300 is outside",
    ),
    "detokenized id above the vocabulary": (pb.DetokenizeRequest(token_ids=[0, 300]), "token_ids[1]", "300 is outside"),
    "detokenized id below the vocabulary": (pb.DetokenizeRequest(token_ids=[-1]), "token_ids[0]", "-1 is outside"),
    "conversation as a continuation": (
        score(text("a"), CHAT),
        "continuations[0].conversation",
        "a conversation cannot be a continuation",
    ),
    # lengths
    "context too long": (score(ids([1] * 33)), "context", "33 tokens; the model's context holds 32"),
    "continuation too long": (score(ids([1] * 30), ids([1] * 3)), "continuations[0]", "33 tokens"),
    "second continuation too long": (score(text("a"), text("b"), ids([1] * 32)), "continuations[1]", "33 tokens"),
    "prompt leaves no room": (generate(ids([1] * 32)), "prompt", "32 tokens and leaves no room to generate"),
    "prompt too long to score": (
        generate(ids([1] * 33), max_tokens=0, prompt_logprobs=options()),
        "prompt",
        "has 33 tokens; the model's context holds 32",
    ),
    "prompt of no tokens": (generate(text("")), "prompt", "has no tokens"),
    "prompt of no ids": (generate(ids([])), "prompt", "has no tokens"),
    # what is told
    "top_count below 0": (score(logprobs=options(top_count=-1)), "logprobs.top_count", "-1 is outside [0, 8]"),
    "top_count above the limit": (score(logprobs=options(top_count=9)), "logprobs.top_count", "9 is outside [0, 8]"),
    "generated top_count above the limit": (
        generate(logprobs=options(top_count=9)),
        "logprobs.top_count",
        "9 is outside [0, 8]",
    ),
    "prompt top_count above the limit": (
        generate(prompt_logprobs=options(top_count=9)),
        "prompt_logprobs.top_count",
        "9 is outside [0, 8]",
    ),
    "named ids above the limit": (
        score(logprobs=options(token_ids=range(9))),
        "logprobs.token_ids",
        "9 are more than this server's 8",
    ),
    "named id below the vocabulary": (
        score(logprobs=options(token_ids=[-1])),
        "logprobs.token_ids[0]",
        "-1 is outside",
    ),
    "named id above the vocabulary": (
        generate(prompt_logprobs=options(token_ids=[3, 300])),
        "prompt_logprobs.token_ids[1]",
        "300 is outside",
    ),
    "score costs too much": (
        score(ids([1] * 21), logprobs=options(top_count=8)),
        "logprobs",
        "21 positions with 8 alternatives each are more than this server's 160",
    ),
    "score with the next token costs too much": (
        score(ids([1] * 20), logprobs=options(top_count=8), next_token=True),
        "logprobs",
        "21 positions with 8 alternatives",
    ),
    "named ids cost as much": (
        score(ids([1] * 21), logprobs=options(top_count=4, token_ids=range(4))),
        "logprobs",
        "21 positions with 8 alternatives",
    ),
    "completions cost too much": (
        generate(max_tokens=7, completion_count=3, logprobs=options(top_count=8)),
        "logprobs",
        "21 positions with 8 alternatives",
    ),
    "room to generate costs too much": (
        generate(ids([1] * 11), max_tokens=10_000, logprobs=options(top_count=8)),
        "logprobs",
        "21 positions with 8 alternatives",
    ),
    "prompt costs too much": (
        generate(ids([1] * 21), prompt_logprobs=options(top_count=8)),
        "prompt_logprobs",
        "21 positions with 8 alternatives",
    ),
    "too many continuations": (
        score(text("a"), *[text("b")] * 5),
        "continuations",
        "5 are more than this server's 4",
    ),
    "roll_stride without rolling": (score(roll_stride=4), "roll_stride", "only for LONG_INPUT_ROLL"),
    "roll_stride with refusing": (
        score(roll_stride=4, long_input=pb.LONG_INPUT_REFUSE),
        "roll_stride",
        "only for LONG_INPUT_ROLL",
    ),
    # how much is generated
    "completion_count 0": (generate(completion_count=0), "completion_count", "0 is outside [1, 4]"),
    "completion_count below 0": (generate(completion_count=-1), "completion_count", "-1 is outside [1, 4]"),
    "completion_count above the limit": (generate(completion_count=5), "completion_count", "5 is outside [1, 4]"),
    "best_of below completion_count": (
        generate(completion_count=3, best_of=2),
        "best_of",
        "2 is below completion_count, 3",
    ),
    "best_of below 0": (generate(best_of=-1), "best_of", "-1 is below completion_count, 1"),
    "best_of above the limit": (generate(completion_count=2, best_of=5), "best_of", "5 is above this server's 4"),
    "draws cost too much": (
        generate(max_tokens=7, best_of=3, logprobs=options(top_count=8)),
        "logprobs",
        "21 positions with 8 alternatives",
    ),
    "last of the best_of draws' seed above the last": (
        generate(best_of=4, sampling=pb.Sampling(seed=LAST_SEED - 2)),
        "sampling.seed",
        "9007199254740989 is outside [0, 9007199254740988]",
    ),
    "max_tokens 0 with two draws": (
        generate(max_tokens=0, best_of=2, prompt_logprobs=options()),
        "best_of",
        "max_tokens 0 goes with one completion, not 2",
    ),
    "max_tokens below 0": (generate(max_tokens=-1), "max_tokens", "-1 is below 0"),
    "max_tokens 0 without prompt_logprobs": (generate(max_tokens=0), "max_tokens", "needs prompt_logprobs"),
    "max_tokens 0 with two completions": (
        generate(max_tokens=0, completion_count=2, prompt_logprobs=options()),
        "completion_count",
        "max_tokens 0 goes with one completion, not 2",
    ),
    # how it is drawn
    "temperature below 0": (sampled(temperature=-0.01), "sampling.temperature", "-0.01 is no finite number"),
    "temperature inf": (sampled(temperature=math.inf), "sampling.temperature", "inf is no finite number"),
    "temperature nan": (sampled(temperature=math.nan), "sampling.temperature", "nan is no finite number"),
    "top_k below 0": (sampled(top_k=-1), "sampling.top_k", "-1 is below 0"),
    "top_p 0": (sampled(top_p=0), "sampling.top_p", "0 is outside (0, 1]"),
    "top_p below 0": (sampled(top_p=-0.5), "sampling.top_p", "-0.5 is outside (0, 1]"),
    "top_p above 1": (sampled(top_p=1.5), "sampling.top_p", "1.5 is outside (0, 1]"),
    "top_p just above 1": (sampled(top_p=1 + 2**-23), "sampling.top_p", "1.0000001 is outside (0, 1]"),
    "top_p nan": (sampled(top_p=math.nan), "sampling.top_p", "nan is outside (0, 1]"),
    "min_p below 0": (sampled(min_p=-0.5), "sampling.min_p", "-0.5 is outside [0, 1]"),
    "min_p above 1": (sampled(min_p=1.5), "sampling.min_p", "1.5 is outside [0, 1]"),
    "min_p nan": (sampled(min_p=math.nan), "sampling.min_p", "nan is outside [0, 1]"),
    "typical_p 0": (sampled(typical_p=0), "sampling.typical_p", "0 is outside (0, 1]"),
    "typical_p below 0": (sampled(typical_p=-0.5), "sampling.typical_p", "-0.5 is outside (0, 1]"),
    "typical_p above 1": (sampled(typical_p=1.5), "sampling.typical_p", "1.5 is outside (0, 1]"),
    "typical_p nan": (sampled(typical_p=math.nan), "sampling.typical_p", "nan is outside (0, 1]"),
    "repetition_penalty 0": (
        sampled(repetition_penalty=0),
        "sampling.repetition_penalty",
        "0 is no finite number above 0",
    ),
    "repetition_penalty below 0": (sampled(repetition_penalty=-1), "sampling.repetition_penalty", "-1 is no finite"),
    "repetition_penalty inf": (sampled(repetition_penalty=math.inf), "sampling.repetition_penalty", "inf is no finite"),
    "repetition_penalty nan": (sampled(repetition_penalty=math.nan), "sampling.repetition_penalty", "nan is no finite"),
    "presence_penalty inf": (sampled(presence_penalty=math.inf), "sampling.presence_penalty", "inf is not finite"),
    "presence_penalty -inf": (sampled(presence_penalty=-math.inf), "sampling.presence_penalty", "-inf is not finite"),
    "presence_penalty nan": (sampled(presence_penalty=math.nan), "sampling.presence_penalty", "nan is not finite"),
    "frequency_penalty inf": (sampled(frequency_penalty=math.inf), "sampling.frequency_penalty", "inf is not finite"),
    "frequency_penalty -inf": (
        sampled(frequency_penalty=-math.inf),
        "sampling.frequency_penalty",
        "-inf is not finite",
    ),
    "frequency_penalty nan": (sampled(frequency_penalty=math.nan), "sampling.frequency_penalty", "nan is not finite"),
    "logit_bias inf": (sampled(logit_bias={5: math.inf}), "sampling.logit_bias[5]", "inf is neither finite nor -inf"),
    "logit_bias nan": (sampled(logit_bias={5: math.nan}), "sampling.logit_bias[5]", "nan is neither finite nor -inf"),
    "biased id below the vocabulary": (
        sampled(logit_bias={7: 1, -1: 1}),
        "sampling.logit_bias[-1]",
        "-1 is outside the vocabulary, [0, 299]",
    ),
    "biased id above the vocabulary": (
        sampled(logit_bias={7: 1, 300: 1}),
        "sampling.logit_bias[300]",
        "300 is outside the vocabulary, [0, 299]",
    ),
    "all tokens banned": (
        sampled(logit_bias=dict.fromkeys(range(300), -math.inf)),
        "sampling.logit_bias",
        "masks all 300 tokens; none is left",
    ),
    "all tokens banned or the end of the sequence": (
        generate(
            sampling=pb.Sampling(logit_bias=dict.fromkeys(range(1, 300), -math.inf)),
            stopping=pb.Stopping(min_tokens=1),
        ),
        "sampling.logit_bias",
        "masks all 300 tokens with min_tokens; none is left",
    ),
    "all tokens banned or stop tokens": (
        generate(
            sampling=pb.Sampling(logit_bias=dict.fromkeys(range(299), -math.inf)),
            stopping=pb.Stopping(min_tokens=1, token_ids=[299], ignore_eos=True),
        ),
        "sampling.logit_bias",
        "masks all 300 tokens with min_tokens; none is left",
    ),
    "seed below 0": (sampled(seed=-1), "sampling.seed", "-1 is outside [0, 9007199254740991]"),
    "seed above the last": (sampled(seed=LAST_SEED + 1), "sampling.seed", "9007199254740992 is outside"),
    "last draw's seed above the last": (
        generate(completion_count=4, sampling=pb.Sampling(seed=LAST_SEED - 2)),
        "sampling.seed",
        "9007199254740989 is outside [0, 9007199254740988]",
    ),
    # where it stops
    "too many stop strings": (
        stopped(strings=[str(i) for i in range(17)]),
        "stopping.strings",
        "17 are more than this server's 16",
    ),
    "empty stop string": (stopped(strings=["a", ""]), "stopping.strings[1]", "'' has 0 bytes, outside [1, 1024]"),
    "stop string too long": (stopped(strings=["x" * 1025]), "stopping.strings[0]", "has 1025 bytes"),
    "stop string of too many bytes": (stopped(strings=["é" * 513]), "stopping.strings[0]", "has 1026 bytes"),
    "too many stop tokens": (stopped(token_ids=range(65)), "stopping.token_ids", "65 are more than 64"),
    "stop token above the vocabulary": (stopped(token_ids=[300]), "stopping.token_ids[0]", "300 is outside"),
    "stop token below the vocabulary": (stopped(token_ids=[2, -1]), "stopping.token_ids[1]", "-1 is outside"),
    "min_tokens below 0": (stopped(min_tokens=-1), "stopping.min_tokens", "-1 is outside [0, max_tokens = 2]"),
    "min_tokens above max_tokens": (stopped(min_tokens=3), "stopping.min_tokens", "3 is outside [0, max_tokens = 2]"),
    "time_limit 0": (stopped(time_limit=duration()), "stopping.time_limit", "0 s and 0 ns are no duration above 0"),
    "time_limit below 0": (stopped(time_limit=duration(-1)), "stopping.time_limit", "-1 s and 0 ns are no duration"),
    "time_limit just below 0": (stopped(time_limit=duration(0, -1)), "stopping.time_limit", "0 s and -1 ns are no"),
    "time_limit of both signs": (stopped(time_limit=duration(1, -1)), "stopping.time_limit", "1 s and -1 ns are no"),
    "time_limit of too many ns": (
        stopped(time_limit=duration(0, 10**9)),
        "stopping.time_limit",
        "0 s and 1000000000 ns are no duration",
    ),
    "time_limit too long": (stopped(time_limit=duration(LONGEST_S + 1)), "stopping.time_limit", "315576000001 s and"),
    # how it is ranked
    "beam score without beams": (ranked(BEAM), "ranking.criterion", "only for beam search"),
    "length_exponent with the mean": (
        ranked(MEAN, length_exponent=0.5),
        "ranking.length_exponent",
        "only for RANKING_CRITERION_LENGTH_NORMALIZED",
    ),
    "length_exponent with the default": (
        generate(ranking=pb.Ranking(length_exponent=0.5)),
        "ranking.length_exponent",
        "only for",
    ),
    "length_exponent below its range": (
        ranked(NORMALIZED, length_exponent=-10.5),
        "ranking.length_exponent",
        "-10.5 is outside [-10, 10]",
    ),
    "length_exponent above its range": (
        ranked(NORMALIZED, length_exponent=10.5),
        "ranking.length_exponent",
        "10.5 is outside [-10, 10]",
    ),
    "length_exponent just above its range": (
        ranked(NORMALIZED, length_exponent=10 + 2**-20),
        "ranking.length_exponent",
        "10.000001 is outside [-10, 10]",
    ),
    "length_exponent nan": (ranked(NORMALIZED, length_exponent=math.nan), "ranking.length_exponent", "nan is outside"),
    # beams
    "no beam": (beams(beam_count=0), "beam_search.beam_count", "0 is outside [1, 6]"),
    "too many beams": (beams(beam_count=7), "beam_search.beam_count", "7 is outside [1, 6]"),
    "fewer beams than completions": (
        generate(completion_count=3, beam_search=pb.BeamSearch(beam_count=2)),
        "beam_search.beam_count",
        "2 is below completion_count, 3",
    ),
    "length_penalty nan": (beams(length_penalty=math.nan), "beam_search.length_penalty", "nan is not finite"),
    "length_penalty infinite": (beams(length_penalty=-math.inf), "beam_search.length_penalty", "-inf is not finite"),
    "best_of with beams": (generate(best_of=2, beam_search=pb.BeamSearch()), "best_of", "does not go with beam_search"),
    "no tokens with beams": (
        generate(max_tokens=0, prompt_logprobs=options(), beam_search=pb.BeamSearch()),
        "max_tokens",
        "0 generates nothing and does not go with beam_search",
    ),
    "length_exponent with the beam score": (
        generate(beam_search=pb.BeamSearch(), ranking=pb.Ranking(criterion=BEAM, length_exponent=1)),
        "ranking.length_exponent",
        "only for RANKING_CRITERION_LENGTH_NORMALIZED",
    ),
    # after a neutral context, in windows, and the whole distribution
    "neutral context without continuations": (
        score(neutral_context=text("a")),
        "neutral_context",
        "needs continuations",
    ),
    "neutral context of no tokens": (
        score(text("a"), text("b"), neutral_context=text("")),
        "neutral_context",
        "has no tokens, and the tokenizer adds none",
    ),
    "neutral context without a form": (score(text("a"), text("b"), neutral_context=EMPTY), "neutral_context", "be set"),
    "neutral context too long": (
        score(text("a"), ids([1]), ids([1] * 20), neutral_context=ids([1] * 13)),
        "continuations[1]",
        "with the neutral context has 33 tokens; the model's context holds 32",
    ),
    "context too long for any continuation": (
        score(ids([1] * 33), text("a"), text("b")),
        "context",
        "has 33 tokens; the model's context holds 32",
    ),
    "roll_stride 0": (rolled(roll_stride=0), "roll_stride", "0 is outside [1, 31]"),
    "roll_stride as long as a window": (rolled(roll_stride=32), "roll_stride", "32 is outside [1, 31]"),
    "too many windows": (
        rolled(ids([1] * 36), roll_stride=1),
        "roll_stride",
        "1 makes 5 windows; this server's limit is 4",
    ),
    "too many windows of several continuations": (
        rolled(ids([1] * 30), ids([1] * 20), ids([1] * 20), roll_stride=9),
        "roll_stride",
        "9 makes 6 windows",
    ),
    "too many windows after the neutral context": (
        rolled(ids([1]), ids([1] * 20), neutral_context=ids([1] * 30), roll_stride=4),
        "roll_stride",
        "4 makes 5 windows",
    ),
    "whole distribution": (
        score(next_token=True, full_distribution=True),
        "full_distribution",
        "is not allowed by this server",
    ),
    # conversations, which this model has no template for
    "conversation as the context": (score(CHAT), "context.conversation", NO_TEMPLATE),
    "conversation as the prompt": (generate(CHAT), "prompt.conversation", NO_TEMPLATE),
    "conversation to tokenize": (pb.TokenizeRequest(input=CHAT), "input.conversation", NO_TEMPLATE),
}
"""What is wrong: the request, the field, and what its description says."""

ACCEPTED: dict[str, Any] = {
    "default beams": beams(),
    "one beam": beams(beam_count=1),
    "most beams": beams(beam_count=6),
    "as many completions as beams": generate(completion_count=3, beam_search=pb.BeamSearch(beam_count=3)),
    "least length_penalty": beams(length_penalty=-3e38),
    "greatest length_penalty": beams(length_penalty=3e38),
    "beams by another criterion": generate(beam_search=pb.BeamSearch(), ranking=pb.Ranking(criterion=MEAN)),
    "beams by beam score": generate(beam_search=pb.BeamSearch(), ranking=pb.Ranking(criterion=BEAM)),
    "smallest and largest ids": score(ids([0, 299]), ids([0, 299])),
    "ids to tokenize": pb.TokenizeRequest(input=ids([0, 299])),
    "ids to detokenize": pb.DetokenizeRequest(token_ids=[0, 299]),
    "no ids to detokenize": pb.DetokenizeRequest(),
    "special tokens for text": score(pb.Input(text="a", add_special_tokens=False)),
    "no special tokens for a continuation": score(text("a"), pb.Input(text="b", add_special_tokens=False)),
    "context that fills the model's": score(ids([1] * 32)),
    "continuation that fills the model's context": score(ids([1] * 30), ids([1] * 2)),
    "prompt that leaves room for one token": generate(ids([1] * 31)),
    "prompt that fills the context, scored": generate(ids([1] * 32), max_tokens=0, prompt_logprobs=options()),
    "one-token prompt": generate(ids([1])),
    "top_count 0": score(logprobs=options(top_count=0)),
    "top_count at the limit": score(logprobs=options(top_count=8)),
    "named ids at the limit": generate(logprobs=options(token_ids=range(8))),
    "smallest and largest named ids": score(logprobs=options(token_ids=[0, 299])),
    "score at the limit of cost": score(ids([1] * 20), logprobs=options(top_count=8)),
    "score with the next token at the limit of cost": score(
        ids([1] * 19), logprobs=options(top_count=8), next_token=True
    ),
    "completions at the limit of cost": generate(max_tokens=5, completion_count=4, logprobs=options(top_count=8)),
    "room to generate at the limit of cost": generate(ids([1] * 12), max_tokens=10_000, logprobs=options(top_count=8)),
    "prompt at the limit of cost": generate(ids([1] * 20), prompt_logprobs=options(top_count=8)),
    "continuations at the limit": score(text("a"), *[text("b")] * 4),
    "no continuations": score(),
    "neutral context": score(text("a"), text("b"), neutral_context=text("c")),
    "neutral context that fills the model's": score(text("a"), ids([1] * 20), neutral_context=ids([1] * 12)),
    "rolling what is short": rolled(),
    "smallest stride": rolled(roll_stride=1),
    "largest stride": rolled(roll_stride=31),
    "windows at the limit": rolled(ids([1] * 35), roll_stride=1),
    "the end of a long context": rolled(ids([1] * 3000), ids([1] * 3), roll_stride=3),
    "refusing long input": score(long_input=pb.LONG_INPUT_REFUSE),
    "one completion": generate(completion_count=1),
    "completions at the limit": generate(completion_count=4),
    "best_of as many as completions": generate(completion_count=3, best_of=3),
    "best_of 1": generate(best_of=1),
    "best_of at the limit": generate(completion_count=2, best_of=4),
    "draws at the limit of cost": generate(max_tokens=5, best_of=4, logprobs=options(top_count=8)),
    "last of the best_of draws with the last seed": generate(best_of=4, sampling=pb.Sampling(seed=LAST_SEED - 3)),
    "max_tokens 0 with one draw": generate(max_tokens=0, best_of=1, prompt_logprobs=options()),
    "one token": generate(max_tokens=1),
    "max_tokens 0 with the prompt scored": generate(max_tokens=0, prompt_logprobs=options()),
    "more max_tokens than room": generate(max_tokens=2**31 - 1),
    "temperature 0": sampled(temperature=0),
    "tiny temperature": sampled(temperature=1e-30),
    "huge temperature": sampled(temperature=3e38),
    "top_k 0": sampled(top_k=0),
    "top_k 1": sampled(top_k=1),
    "top_k beyond the vocabulary": sampled(top_k=2**31 - 1),
    "tiny top_p": sampled(top_p=1e-30),
    "top_p 1": sampled(top_p=1),
    "min_p 0": sampled(min_p=0),
    "min_p 1": sampled(min_p=1),
    "tiny typical_p": sampled(typical_p=1e-30),
    "typical_p 1": sampled(typical_p=1),
    "tiny repetition_penalty": sampled(repetition_penalty=1e-38),
    "huge repetition_penalty": sampled(repetition_penalty=3e38),
    "smallest presence_penalty": sampled(presence_penalty=-3e38),
    "largest presence_penalty": sampled(presence_penalty=3e38),
    "smallest frequency_penalty": sampled(frequency_penalty=-3e38),
    "largest frequency_penalty": sampled(frequency_penalty=3e38),
    "smallest and largest biased id": sampled(logit_bias={0: -1, 299: 1}),
    "smallest and largest bias": sampled(logit_bias={1: -3e38, 2: 3e38}),
    "all that is finite pulls the same way": sampled(
        repetition_penalty=1e-38, presence_penalty=-3e38, frequency_penalty=-3e38, logit_bias={1: 3e38}
    ),
    "all tokens banned but one": sampled(logit_bias=dict.fromkeys(range(299), -math.inf)),
    "all tokens banned but the end of the sequence": sampled(logit_bias=dict.fromkeys(range(1, 300), -math.inf)),
    "all tokens banned but an ignored end of the sequence": generate(
        sampling=pb.Sampling(logit_bias=dict.fromkeys(range(1, 300), -math.inf)),
        stopping=pb.Stopping(min_tokens=1, ignore_eos=True),
    ),
    "seed 0": sampled(seed=0),
    "last seed": sampled(seed=LAST_SEED),
    "last draw with the last seed": generate(completion_count=4, sampling=pb.Sampling(seed=LAST_SEED - 3)),
    "stop strings at the limit": stopped(strings=[str(i) for i in range(16)]),
    "longest stop string": stopped(strings=["x" * 1024]),
    "stop string of most bytes": stopped(strings=["é" * 512]),
    "stop tokens at the limit": stopped(token_ids=range(64)),
    "smallest and largest stop token": stopped(token_ids=[0, 299]),
    "min_tokens 0": stopped(min_tokens=0),
    "min_tokens as many as max_tokens": stopped(min_tokens=2),
    "shortest time_limit": stopped(time_limit=duration(0, 1)),
    "time_limit of most ns": stopped(time_limit=duration(0, 10**9 - 1)),
    "longest time_limit": stopped(time_limit=duration(LONGEST_S)),
    "total as the criterion": ranked(TOTAL),
    "default length_exponent": ranked(NORMALIZED),
    "smallest length_exponent": ranked(NORMALIZED, length_exponent=-10),
    "largest length_exponent": ranked(NORMALIZED, length_exponent=10),
    "defaults spelled out": sampled(
        temperature=1,
        top_k=0,
        top_p=1,
        min_p=0,
        typical_p=1,
        repetition_penalty=1,
        presence_penalty=0,
        frequency_penalty=0,
    ),
    "nothing spelled out": pb.GenerateRequest(prompt=text("ab")),
    "what is served": pb.GetModelRequest(),
}
"""What is right, often only just."""


@pytest.mark.parametrize("case", REFUSED)
def test_a_broken_rule_is_told_with_its_field_and_value(case: str, strict: Served) -> None:
    request, field, description = REFUSED[case]
    refused = refusal(lambda: answer(strict, request))
    assert refused.code is grpc.StatusCode.INVALID_ARGUMENT
    assert (refused.info.domain, refused.info.reason) == ("logprobs", "INVALID_REQUEST")
    assert refused.fields == [field]
    assert description in refused.violations[0][1]
    assert refused.message == ": ".join(refused.violations[0])


@pytest.mark.parametrize("case", ACCEPTED)
def test_what_breaks_no_rule_is_answered(case: str, strict: Served) -> None:
    assert answer(strict, ACCEPTED[case])


@pytest.mark.parametrize("top_count", [299, 300, 301])
def test_there_are_no_more_alternatives_than_tokens(top_count: int, tiny_folder: Path) -> None:
    with running(tiny_folder, max_top_count=1000) as served:
        request = score(logprobs=options(top_count=top_count))
        if top_count <= VOCABULARY:
            [sequence] = served.score(request)
            assert len(sequence.tokens[1].top) == top_count
        else:
            refused = refusal(lambda: served.score(request))
            assert refused.violations == [("logprobs.top_count", "301 is above the vocabulary's size, 300")]


@pytest.mark.parametrize(
    ("request_", "field"),
    [pytest.param(score(), "context", id="Score"), pytest.param(generate(), "prompt", id="Generate")],
)
def test_what_the_engine_could_never_do_is_refused(
    request_: Any, field: str, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TorchEngine, "unfit", lambda engine, job: "needs more than there is")
    with running(tiny_folder) as served:
        refused = refusal(lambda: answer(served, request_))
    assert refused.code is grpc.StatusCode.INVALID_ARGUMENT
    assert refused.violations == [(field, "needs more than there is")]


ALL_WRONG: dict[str, tuple[Any, list[str]]] = {
    "Generate": (
        pb.GenerateRequest(
            prompt=ids([300]),
            max_tokens=-1,
            completion_count=5,
            best_of=6,
            sampling=pb.Sampling(temperature=-1, top_p=2, seed=-1, presence_penalty=math.nan),
            stopping=pb.Stopping(strings=[""], token_ids=[-1], min_tokens=-1),
            logprobs=options(top_count=9),
            prompt_logprobs=options(token_ids=[300]),
            ranking=pb.Ranking(criterion=BEAM),
        ),
        [
            "completion_count",
            "best_of",
            "max_tokens",
            "sampling.temperature",
            "sampling.top_p",
            "sampling.presence_penalty",
            "sampling.seed",
            "stopping.strings[0]",
            "stopping.token_ids[0]",
            "stopping.min_tokens",
            "ranking.criterion",
            "logprobs.top_count",
            "prompt_logprobs.token_ids[0]",
            "prompt.token_ids.ids[0]",
        ],
    ),
    "Score": (
        score(
            EMPTY, CHAT, ids([300]), text("a"), neutral_context=ids([-1]), roll_stride=1, logprobs=options(top_count=9)
        ),
        [
            "roll_stride",
            "logprobs.top_count",
            "context",
            "continuations[0].conversation",
            "continuations[1].token_ids.ids[0]",
            "neutral_context.token_ids.ids[0]",
        ],
    ),
    "Score, lengths": (
        score(ids([1] * 20), ids([1] * 13), text("a"), ids([1] * 14)),
        ["continuations[0]", "continuations[2]"],
    ),
    "a long prompt and a scalar": (
        generate(ids([1] * 40), sampling=pb.Sampling(top_p=2)),
        ["sampling.top_p", "prompt"],
    ),
    "no prompt and a scalar": (generate(text(""), sampling=pb.Sampling(top_p=2)), ["sampling.top_p", "prompt"]),
    "a long context and a scalar": (
        score(ids([1] * 40), logprobs=options(top_count=9)),
        ["logprobs.top_count", "context"],
    ),
}


@pytest.mark.parametrize("case", ALL_WRONG)
def test_all_broken_rules_are_told_at_once(case: str, strict: Served) -> None:
    request, fields = ALL_WRONG[case]
    refused = refusal(lambda: answer(strict, request))
    assert refused.fields == fields
    assert refused.message.endswith(f" (and {len(fields) - 1} more)")


def test_twenty_broken_rules_are_told_and_none_counted(strict: Served) -> None:
    refused = refusal(lambda: answer(strict, pb.DetokenizeRequest(token_ids=[300] * 20)))
    assert refused.fields == [f"token_ids[{i}]" for i in range(20)]
    assert refused.message.endswith("(and 19 more)")


@pytest.mark.parametrize("count", [21, 1000, 100_000])
def test_beyond_twenty_broken_rules_are_counted(count: int, strict: Served) -> None:
    refused = refusal(lambda: answer(strict, pb.DetokenizeRequest(token_ids=[300] * count)))
    assert refused.fields == [f"token_ids[{i}]" for i in range(20)] + [""]
    assert refused.violations[-1][1] == f"and {count - 20} more"
    assert refused.message.endswith(f"(and {count - 1} more)")


@pytest.mark.parametrize(
    "request_",
    [
        pytest.param(score(ids([-(2**31)] * 1000), *[ids([2**31 - 1] * 1000)] * 4), id="ids"),
        pytest.param(stopped(strings=["\U0001f600" * 1024] * 16, token_ids=[-(2**31)] * 64), id="stop strings"),
        pytest.param(stopped(strings=["\x00" * 2000] * 16, token_ids=[-(2**31)] * 64), id="control characters"),
    ],
)
def test_details_fit_into_the_trailers_whatever_is_wrong(request_: Any, strict: Served) -> None:
    refused = refusal(lambda: answer(strict, request_))
    assert refused.details_bytes < 4096
    assert refused.violations[-1][0] == ""
    told = len(refused.violations) - 1
    assert 5 <= told <= 20


@pytest.mark.parametrize("string", ["x" * 2000, "\x00" * 2000, "\U0001f600" * 500], ids=["letters", "escapes", "emoji"])
def test_a_long_value_is_cut(string: str, strict: Served) -> None:
    refused = refusal(lambda: answer(strict, stopped(strings=[string])))
    shown, _, rule = refused.violations[0][1].partition(" has ")
    assert len(shown) == 64
    assert repr(string).startswith(shown[:-1])
    assert shown.endswith("…")
    assert rule == f"{len(string.encode())} bytes, outside [1, 1024]"
