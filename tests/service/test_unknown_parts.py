"""Nothing of a request is ever ignored: fields and enum values that the server does not know are refused by their path.

Requests are written as bytes, as a client of a later contract would send them.
"""

from __future__ import annotations

from typing import Any

import grpc
import pytest
from harness import SERVICE, Refusal, Served, answer, refusal, text
from logprobs.v1 import logprobs_pb2 as pb

UNKNOWN = 99
STREAMS = {"Generate"}


def field(number: int, payload: bytes) -> bytes:
    """An embedded message, or a string."""
    return _varint(number << 3 | 2) + _varint(len(payload)) + payload


def number(number: int, value: int) -> bytes:
    """A field that holds a number."""
    return _varint(number << 3) + _varint(value)


def _varint(value: int) -> bytes:
    groups = []
    while value > 0x7F:
        groups.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*groups, value])


def sent(served: Served, method: str, data: bytes) -> Refusal:
    """The refusal of a request that is given as bytes."""
    path = f"/{SERVICE}/{method}"
    channel: Any = served.channel
    if method in STREAMS:
        return refusal(lambda: list(channel.unary_stream(path)(data)))
    return refusal(lambda: channel.unary_unary(path)(data))


NEW = number(UNKNOWN, 1)
TEXT = field(1, b"a")
CASES: dict[str, tuple[str, bytes, str]] = {
    "Score": ("Score", field(1, TEXT) + NEW, "99"),
    "Score, context": ("Score", field(1, TEXT + NEW), "context.99"),
    "Score, token ids": ("Score", field(1, field(2, NEW)), "context.token_ids.99"),
    "Score, second continuation": (
        "Score",
        field(1, TEXT) + field(2, TEXT) + field(2, TEXT + NEW),
        "continuations[1].99",
    ),
    "Score, options": ("Score", field(1, TEXT) + field(3, NEW), "logprobs.99"),
    "Generate": ("Generate", field(1, TEXT) + NEW, "99"),
    "Generate, sampling": ("Generate", field(1, TEXT) + field(5, NEW), "sampling.99"),
    "Generate, time limit": ("Generate", field(1, TEXT) + field(7, field(6, NEW)), "stopping.time_limit.99"),
    "Generate, message of a conversation": (
        "Generate",
        field(1, field(3, field(1, b"") + field(1, NEW))),
        "prompt.conversation.messages[1].99",
    ),
    "Generate, a string": ("Generate", field(1, TEXT) + field(5, field(UNKNOWN, b"new")), "sampling.99"),
    "Tokenize": ("Tokenize", field(1, TEXT) + NEW, "99"),
    "Tokenize, input": ("Tokenize", field(1, TEXT + NEW), "input.99"),
    "Detokenize": ("Detokenize", NEW, "99"),
    "GetModel": ("GetModel", NEW, "99"),
}


@pytest.mark.parametrize("case", CASES)
def test_an_unknown_field_is_refused_by_its_path(case: str, tiny: Served) -> None:
    method, data, path = CASES[case]
    refused = sent(tiny, method, data)
    assert refused.code is grpc.StatusCode.INVALID_ARGUMENT
    assert refused.info.reason == "INVALID_REQUEST"
    assert refused.violations == [(path, "a field with this number is not known to this server")]


ENUMS: dict[str, tuple[Any, str, str]] = {
    "ranking": (
        pb.GenerateRequest(prompt=text("a"), ranking=pb.Ranking(criterion=77)),  # type: ignore[arg-type]
        "ranking.criterion",
        "RankingCriterion",
    ),
    "long input": (
        pb.ScoreRequest(context=text("a"), long_input=77),  # type: ignore[arg-type]
        "long_input",
        "LongInput",
    ),
    "early stopping": (
        pb.GenerateRequest(prompt=text("a"), beam_search=pb.BeamSearch(early_stopping=77)),  # type: ignore[arg-type]
        "beam_search.early_stopping",
        "EarlyStopping",
    ),
    "end of a continuation's conversation": (
        pb.ScoreRequest(
            context=text("a"),
            continuations=[text("a"), pb.Input(conversation=pb.Conversation(end=77))],  # type: ignore[arg-type]
        ),
        "continuations[1].conversation.end",
        "ConversationEnd",
    ),
    "end of a conversation to tokenize": (
        pb.TokenizeRequest(input=pb.Input(conversation=pb.Conversation(end=-1))),  # type: ignore[arg-type]
        "input.conversation.end",
        "ConversationEnd",
    ),
}


@pytest.mark.parametrize("case", ENUMS)
def test_an_unknown_enum_value_is_refused_by_its_path(case: str, tiny: Served) -> None:
    request, path, enum = ENUMS[case]
    refused = refusal(lambda: answer(tiny, request))
    assert refused.code is grpc.StatusCode.INVALID_ARGUMENT
    [(told, description)] = refused.violations
    assert told == path
    assert f"is no value of {enum} known to this server" in description


def test_all_unknown_parts_are_told_at_once(tiny: Served) -> None:
    refused = sent(
        tiny, "Generate", field(1, TEXT + NEW) + field(5, NEW + number(98, 1)) + field(10, number(1, 77)) + NEW
    )
    assert set(refused.fields) == {"prompt.99", "sampling.98", "sampling.99", "ranking.criterion", "99"}


def test_a_request_full_of_unknown_fields_is_refused_in_few_words(tiny: Served) -> None:
    refused = sent(tiny, "Detokenize", NEW * 100_000)
    assert len(refused.violations) == 21
    assert refused.details_bytes < 4096


MALFORMED = {
    "no fields at all": b"\xff\xff\xff",
    "a field cut short": field(1, TEXT)[:-1],
    "text that is no UTF-8": field(1, field(1, b"\xff")),
}


@pytest.mark.parametrize("method", ["Score", "Generate", "Tokenize"])
@pytest.mark.parametrize("case", MALFORMED)
def test_bytes_that_are_no_message_are_called_malformed(case: str, method: str, tiny: Served) -> None:
    refused = sent(tiny, method, MALFORMED[case])
    assert refused.code is grpc.StatusCode.INVALID_ARGUMENT
    assert (refused.info.domain, refused.info.reason) == ("logprobs", "MALFORMED_REQUEST")
    assert refused.violations == []


@pytest.mark.parametrize("method", ["Detokenize", "GetModel"])
def test_every_method_calls_malformed_what_is(method: str, tiny: Served) -> None:
    assert sent(tiny, method, b"\xff\xff\xff").info.reason == "MALFORMED_REQUEST"
