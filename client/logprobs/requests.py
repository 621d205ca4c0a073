"""Builds request messages from plain Python values; shared by the clients. No I/O, and no rules but those of types.

Whether values are within their bounds is for the server to say, all breaches at once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeAlias, TypedDict, TypeVar, Unpack

from google.protobuf.message import Message

from logprobs.errors import InvalidTextError
from logprobs.ranking import Criterion
from logprobs.v1 import logprobs_pb2 as pb

__all__ = [
    "EarlyStopping",
    "GenerateOptions",
    "InputLike",
    "RankedBy",
    "ScoreOptions",
    "detokenize_request",
    "generate_request",
    "score_request",
    "tokenize_request",
]

EarlyStopping: TypeAlias = Literal["heuristic", "when_full", "never"]
"""When a beam search ends; transformers' `early_stopping` False, True and "never"."""
RankedBy: TypeAlias = Literal[Criterion, "beam_score"]
"""What a server ranks completions by: a criterion of `rank`, or for beam search its own."""
InputLike: TypeAlias = str | Sequence[int] | Sequence[pb.ChatMessage] | Sequence[Mapping[str, str]] | pb.Input
"""Text, token ids, a conversation (messages, or their "role" and "content"), or the message of any of them."""

_Request = TypeVar("_Request", bound=Message)
_CRITERIA: dict[str, pb.RankingCriterion.ValueType] = {
    "mean": pb.RANKING_CRITERION_MEAN_LOGPROB,
    "total": pb.RANKING_CRITERION_TOTAL_LOGPROB,
    "length_normalized": pb.RANKING_CRITERION_LENGTH_NORMALIZED,
    "beam_score": pb.RANKING_CRITERION_BEAM_SCORE,
}
_EARLY_STOPPING: dict[str, pb.EarlyStopping.ValueType] = {
    "heuristic": pb.EARLY_STOPPING_HEURISTIC,
    "when_full": pb.EARLY_STOPPING_WHEN_FULL,
    "never": pb.EARLY_STOPPING_NEVER,
}
_LONG_INPUT: dict[str, pb.LongInput.ValueType] = {"refuse": pb.LONG_INPUT_REFUSE, "roll": pb.LONG_INPUT_ROLL}
_LISTS = ("token_ids", "stop_token_ids")
_COLLECTIONS = (*_LISTS, "stop", "logit_bias")
_SCORE = ("roll_stride", "totals_only", "next_token", "full_distribution")
_GENERATE = ("max_tokens", "completion_count", "best_of")
_SAMPLING = (
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "typical_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "seed",
)
_BEAM_SEARCH = ("beam_count", "length_penalty", "early_stopping")
_LOGPROBS = {"top": "top_count", "token_ids": "token_ids", "entropy": "entropy"}
_STOPPING = {
    "stop_token_ids": "token_ids",
    "include_stop": "include",
    "min_tokens": "min_tokens",
    "ignore_eos": "ignore_eos",
}


class ScoreOptions(TypedDict, total=False):
    """Options of a Score request; None leaves the choice to the server.

    top: alternatives per position, the most probable tokens. token_ids: alternatives by id, in this order.
    entropy: also of each position. next_token: also the distribution after the last token;
    full_distribution: with the logprob of every token id, where the server allows it.
    neutral_context: score each continuation after this too, for `pmi`.
    """

    top: int | None
    token_ids: Sequence[int]
    entropy: bool
    neutral_context: InputLike | None
    long_input: Literal["refuse", "roll"] | None
    roll_stride: int | None
    totals_only: bool
    next_token: bool
    full_distribution: bool


class GenerateOptions(TypedDict, total=False):
    """Options of a Generate request; None leaves the choice to the server, whose defaults `model()` tells.

    stop: strings that end a completion; include_stop keeps them in its text. time_limit: seconds.
    top, token_ids, entropy: as in ScoreOptions, per generated token. prompt_logprobs: report the prompt's tokens
    too, with the same three. criterion: what completions are ranked by; "beam_score" goes with beam search only.
    beam_count, length_penalty, early_stopping: any of them searches with beams instead of sampling.
    """

    max_tokens: int | None
    completion_count: int | None
    best_of: int | None
    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    typical_p: float | None
    repetition_penalty: float | None
    presence_penalty: float | None
    frequency_penalty: float | None
    logit_bias: Mapping[int, float] | None
    seed: int | None
    beam_count: int | None
    length_penalty: float | None
    early_stopping: EarlyStopping | None
    stop: Sequence[str]
    stop_token_ids: Sequence[int]
    include_stop: bool
    min_tokens: int | None
    ignore_eos: bool
    time_limit: float | None
    top: int | None
    token_ids: Sequence[int]
    entropy: bool
    prompt_logprobs: bool
    criterion: RankedBy | None
    length_exponent: float | None


def score_request(
    context: InputLike | pb.ScoreRequest, continuations: Sequence[InputLike] = (), **options: Unpack[ScoreOptions]
) -> pb.ScoreRequest:
    """A ScoreRequest; of a ready one, a copy with the options set on top.

    Raises:
        InvalidTextError: a text holds a lone surrogate. TypeError, ValueError: a value is not of its field's type.
    """
    given = _given(options, ScoreOptions)
    request = _begun(context, pb.ScoreRequest, "context")
    for index, continuation in enumerate(_several(continuations, "continuations")):
        request.continuations.append(_input(continuation, f"continuations[{index}]"))
    _set(request.logprobs, given, _LOGPROBS)
    if "neutral_context" in given:
        request.neutral_context.CopyFrom(_input(given["neutral_context"], "neutral_context"))
    if "long_input" in given:
        request.long_input = _one_of(_LONG_INPUT, given["long_input"], "long_input")
    _set(request, given, _same(_SCORE))
    return request


def generate_request(prompt: InputLike | pb.GenerateRequest, **options: Unpack[GenerateOptions]) -> pb.GenerateRequest:
    """A GenerateRequest; of a ready one, a copy with the options set on top.

    Raises:
        InvalidTextError: a text holds a lone surrogate. TypeError, ValueError: a value is not of its field's type,
            or options of sampling and of beam search meet, in a ready request or here.
    """
    given = _given(options, GenerateOptions)
    request = _begun(prompt, pb.GenerateRequest, "prompt")
    _set(request, given, _same(_GENERATE))
    _set_search(request, given)
    _set_stopping(request.stopping, given)
    _set(request.logprobs, given, _LOGPROBS)
    if "prompt_logprobs" in given:
        request.prompt_logprobs.SetInParent()
        _set(request.prompt_logprobs, given, _LOGPROBS)
    if "criterion" in given:
        request.ranking.criterion = _one_of(_CRITERIA, given["criterion"], "criterion")
    _set(request.ranking, given, _same(("length_exponent",)))
    return request


def tokenize_request(
    value: InputLike | pb.TokenizeRequest, *, add_special_tokens: bool | None = None
) -> pb.TokenizeRequest:
    """A TokenizeRequest; of a ready one, a copy with the option set on top."""
    request = _begun(value, pb.TokenizeRequest, "input")
    if add_special_tokens is not None:
        request.input.add_special_tokens = add_special_tokens
    return request


def detokenize_request(
    token_ids: Sequence[int] | pb.DetokenizeRequest, *, keep_special: bool = False
) -> pb.DetokenizeRequest:
    """A DetokenizeRequest; of a ready one, a copy with the option set on top."""
    request = pb.DetokenizeRequest()
    if isinstance(token_ids, pb.DetokenizeRequest):
        request.CopyFrom(token_ids)
    else:
        request.token_ids.extend(_several(token_ids, "token_ids"))
    if keep_special:
        request.keep_special = True
    return request


def _given(options: Any, kind: Any) -> dict[str, Any]:
    """The options that say something. Zeroes and the empty text do; None, False and empty lists do not."""
    unknown = options.keys() - kind.__annotations__.keys()
    if unknown:
        raise TypeError(f"unknown option: {', '.join(sorted(unknown))}")
    return {
        name: value
        for name, value in options.items()
        if value is not None and value is not False and not (name in _COLLECTIONS and len(value) == 0)
    }


def _begun(value: InputLike | _Request, kind: type[_Request], field: str) -> _Request:
    """A request of that kind that holds the input, or a copy of a ready one."""
    request = kind()
    if isinstance(value, kind):
        request.CopyFrom(value)
    else:
        getattr(request, field).CopyFrom(_input(value, field))
    return request


def _input(value: Any, field: str) -> pb.Input:
    if isinstance(value, pb.Input):
        return value
    if isinstance(value, str):
        return pb.Input(text=_sound(value, f"{field}.text"))
    items = list(_several(value, field))
    if items and isinstance(items[0], pb.ChatMessage | Mapping):
        messages = [_message(item, f"{field}.conversation.messages[{index}]") for index, item in enumerate(items)]
        return pb.Input(conversation=pb.Conversation(messages=messages))
    return pb.Input(token_ids=pb.TokenIds(ids=items))


def _message(item: Any, field: str) -> pb.ChatMessage:
    if isinstance(item, pb.ChatMessage):
        return item
    if item.keys() != {"role", "content"}:
        raise TypeError(f'{field}: a message has "role" and "content", not {sorted(item)}')
    return pb.ChatMessage(**{key: _sound(text, f"{field}.{key}") for key, text in item.items()})


def _several(values: Any, field: str) -> Any:
    """The values, unless they are one text, whose items would be its characters."""
    if isinstance(values, str | bytes):
        raise TypeError(f"{field}: a {type(values).__name__} is not a list")
    return values


def _sound(text: str, field: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidTextError(field, error.start) from None
    return text


def _one_of(values: Mapping[str, Any], name: str, field: str) -> Any:
    if name not in values:
        raise ValueError(f"{field}: {name!r} is none of {', '.join(map(repr, values))}")
    return values[name]


def _set_search(request: pb.GenerateRequest, given: Mapping[str, Any]) -> None:
    sampling = [name for name in (*_SAMPLING, "logit_bias") if name in given]
    beams = [name for name in _BEAM_SEARCH if name in given]
    if sampling and (beams or request.HasField("beam_search")):
        raise ValueError(f"{sampling[0]}: beam search does not sample")
    if beams and request.HasField("sampling"):
        raise ValueError(f"{beams[0]}: the request samples, and beam search does not")
    if sampling:
        _set(request.sampling, given, _same(_SAMPLING))
        for token_id, bias in given.get("logit_bias", {}).items():
            request.sampling.logit_bias[token_id] = bias
    if beams:
        _set(request.beam_search, given, _same(("beam_count", "length_penalty")))
    if "early_stopping" in given:
        early = _one_of(_EARLY_STOPPING, given["early_stopping"], "early_stopping")
        request.beam_search.early_stopping = early


def _set_stopping(message: pb.Stopping, given: Mapping[str, Any]) -> None:
    if "stop" in given:
        texts = enumerate(_several(given["stop"], "stop"))
        message.strings[:] = [_sound(text, f"stopping.strings[{index}]") for index, text in texts]
    _set(message, given, _STOPPING)
    if "time_limit" in given:
        message.time_limit.FromNanoseconds(round(given["time_limit"] * 1e9))


def _set(message: Message, given: Mapping[str, Any], fields: Mapping[str, str]) -> None:
    """Sets the fields whose options are given; `fields` maps an option to its field."""
    for option, field in fields.items():
        if option in _LISTS and option in given:
            getattr(message, field)[:] = _several(given[option], option)
        elif option in given:
            setattr(message, field, given[option])


def _same(names: Sequence[str]) -> dict[str, str]:
    """Options that are called as their fields are."""
    return {name: name for name in names}
