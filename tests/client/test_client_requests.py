"""Building requests: what a caller says lands in its field, and what he leaves unsaid stays unset."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from google.protobuf.json_format import MessageToDict
from hypothesis import given
from hypothesis import strategies as st
from logprobs import InvalidTextError
from logprobs.requests import (
    GenerateOptions,
    ScoreOptions,
    detokenize_request,
    generate_request,
    score_request,
    tokenize_request,
)
from logprobs.v1 import logprobs_pb2 as pb

CHAT = [{"role": "user", "content": "Hi"}]
SEARCH = GenerateOptions(beam_count=4, length_penalty=0.0, early_stopping="when_full")
CHAT_MESSAGE = pb.ChatMessage(role="user", content="Hi")
CONVERSATION = pb.Input(conversation=pb.Conversation(messages=[CHAT_MESSAGE]))

INPUTS = [
    pytest.param("Hi", pb.Input(text="Hi"), id="text"),
    pytest.param("", pb.Input(text=""), id="empty text"),
    pytest.param([1, 2], pb.Input(token_ids=pb.TokenIds(ids=[1, 2])), id="ids"),
    pytest.param(range(2), pb.Input(token_ids=pb.TokenIds(ids=[0, 1])), id="a range of ids"),
    pytest.param([], pb.Input(token_ids=pb.TokenIds()), id="no ids"),
    pytest.param(CHAT, CONVERSATION, id="dicts"),
    pytest.param([CHAT_MESSAGE], CONVERSATION, id="messages"),
    pytest.param(
        pb.Input(text="Hi", add_special_tokens=False), pb.Input(text="Hi", add_special_tokens=False), id="ready"
    ),
]


@pytest.mark.parametrize(("value", "expected"), INPUTS)
def test_each_form_of_input_has_its_field(value: Any, expected: pb.Input) -> None:
    assert generate_request(value).prompt == expected
    assert score_request(value).context == expected
    assert score_request("", [value]).continuations[0] == expected
    assert score_request("", neutral_context=value or None).neutral_context == (expected if value else pb.Input())
    assert tokenize_request(value).input == expected


@pytest.mark.parametrize("build", [generate_request, score_request])
def test_what_is_not_said_is_not_sent(build: Callable[..., Any]) -> None:
    kind: Any = GenerateOptions if build is generate_request else ScoreOptions
    unsaid = dict.fromkeys(kind.__annotations__)
    assert [field.name for field, _ in build("Hi", **unsaid).ListFields()] == [
        "prompt" if build is generate_request else "context"
    ]
    assert build("Hi", **unsaid) == build("Hi")


def test_each_option_of_generate_has_its_field() -> None:
    options = GenerateOptions(
        max_tokens=0,
        completion_count=2,
        best_of=3,
        temperature=0.0,
        top_k=0,
        top_p=0.5,
        min_p=0.25,
        typical_p=0.75,
        repetition_penalty=1.5,
        presence_penalty=-0.5,
        frequency_penalty=0.0,
        logit_bias={5: -1.5},
        seed=0,
        stop=["\n"],
        stop_token_ids=[9],
        include_stop=True,
        min_tokens=1,
        ignore_eos=True,
        time_limit=1.5,
        top=4,
        token_ids=[6, 5],
        entropy=True,
        prompt_logprobs=True,
        criterion="length_normalized",
        length_exponent=0.5,
    )
    assert options.keys() | SEARCH.keys() == GenerateOptions.__annotations__.keys()
    request = generate_request("Hi", **options)
    logprobs = {"top_count": 4, "token_ids": [6, 5], "entropy": True}
    assert MessageToDict(request, preserving_proto_field_name=True) == {
        "prompt": {"text": "Hi"},
        "max_tokens": 0,
        "completion_count": 2,
        "best_of": 3,
        "sampling": {
            "temperature": 0.0,
            "top_k": 0,
            "top_p": 0.5,
            "min_p": 0.25,
            "typical_p": 0.75,
            "repetition_penalty": 1.5,
            "presence_penalty": -0.5,
            "frequency_penalty": 0.0,
            "logit_bias": {"5": -1.5},
            "seed": "0",
        },
        "stopping": {
            "strings": ["\n"],
            "token_ids": [9],
            "include": True,
            "min_tokens": 1,
            "ignore_eos": True,
            "time_limit": "1.500s",
        },
        "logprobs": logprobs,
        "prompt_logprobs": logprobs,
        "ranking": {"criterion": "RANKING_CRITERION_LENGTH_NORMALIZED", "length_exponent": 0.5},
    }


def test_each_option_of_beam_search_has_its_field() -> None:
    request = generate_request("Hi", **SEARCH, criterion="beam_score")
    assert MessageToDict(request, preserving_proto_field_name=True) == {
        "prompt": {"text": "Hi"},
        "beam_search": {"beam_count": 4, "length_penalty": 0.0, "early_stopping": "EARLY_STOPPING_WHEN_FULL"},
        "ranking": {"criterion": "RANKING_CRITERION_BEAM_SCORE"},
    }


@pytest.mark.parametrize("name", SEARCH)
def test_any_option_of_beam_search_alone_asks_for_one(name: str) -> None:
    request = generate_request("Hi", **{name: SEARCH[name]})  # type: ignore[literal-required, misc]
    assert [field.name for field, _ in request.beam_search.ListFields()] == [name]


def test_each_option_of_score_has_its_field() -> None:
    options = ScoreOptions(
        top=4,
        token_ids=[6],
        entropy=True,
        neutral_context="",
        long_input="roll",
        roll_stride=8,
        totals_only=True,
        next_token=True,
        full_distribution=True,
    )
    assert options.keys() == ScoreOptions.__annotations__.keys()
    request = score_request("Hi", ["a", [1]], **options)
    assert MessageToDict(request, preserving_proto_field_name=True) == {
        "context": {"text": "Hi"},
        "continuations": [{"text": "a"}, {"token_ids": {"ids": [1]}}],
        "logprobs": {"top_count": 4, "token_ids": [6], "entropy": True},
        "neutral_context": {"text": ""},
        "long_input": "LONG_INPUT_ROLL",
        "roll_stride": 8,
        "totals_only": True,
        "next_token": True,
        "full_distribution": True,
    }


def test_prompt_logprobs_need_no_other_option() -> None:
    assert generate_request("Hi", prompt_logprobs=True).HasField("prompt_logprobs")


def test_the_other_requests_have_their_option() -> None:
    assert tokenize_request("Hi", add_special_tokens=False).input.add_special_tokens is False
    assert not tokenize_request("Hi").input.HasField("add_special_tokens")
    assert detokenize_request([1, 2], keep_special=True) == pb.DetokenizeRequest(token_ids=[1, 2], keep_special=True)


def test_options_go_on_top_of_a_copy_of_a_ready_request() -> None:
    ready = pb.GenerateRequest(prompt=pb.Input(text="Hi"), max_tokens=5, sampling=pb.Sampling(top_k=3, seed=1))
    before = pb.GenerateRequest()
    before.CopyFrom(ready)
    request = generate_request(ready, seed=2)
    assert (request.max_tokens, request.sampling.top_k, request.sampling.seed) == (5, 3, 2)
    assert ready == before


@pytest.mark.parametrize(
    ("build", "ready"),
    [
        (score_request, pb.ScoreRequest(context=pb.Input(text="Hi"), roll_stride=3)),
        (generate_request, pb.GenerateRequest(prompt=pb.Input(text="Hi"), beam_search=pb.BeamSearch(beam_count=2))),
        (tokenize_request, pb.TokenizeRequest(input=pb.Input(text="Hi"))),
        (detokenize_request, pb.DetokenizeRequest(token_ids=[1])),
    ],
    ids=["score", "generate", "tokenize", "detokenize"],
)
def test_a_ready_request_is_sent_as_it_is(build: Callable[[Any], Any], ready: Any) -> None:
    assert build(ready) == ready
    assert build(ready) is not ready


@pytest.mark.parametrize(
    ("ready", "options", "message"),
    [
        (pb.GenerateRequest(beam_search=pb.BeamSearch()), {"seed": 1}, "seed: beam search does not sample"),
        (pb.GenerateRequest(), {"logit_bias": {1: 2}, "beam_count": 3}, "logit_bias: beam search does not sample"),
        (
            pb.GenerateRequest(sampling=pb.Sampling()),
            {"length_penalty": 1.0},
            "length_penalty: the request samples, and beam search does not",
        ),
    ],
    ids=["ready search", "both as options", "ready sampling"],
)
def test_sampling_and_beam_search_do_not_silently_replace_each_other(
    ready: pb.GenerateRequest, options: Any, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        generate_request(ready, **options)


LONE = "a\ud800"
TEXTS = [
    pytest.param(lambda: score_request(LONE), "context.text", id="context"),
    pytest.param(lambda: score_request("", ["", LONE]), "continuations[1].text", id="continuation"),
    pytest.param(lambda: score_request("", neutral_context=LONE), "neutral_context.text", id="neutral context"),
    pytest.param(lambda: generate_request(LONE), "prompt.text", id="prompt"),
    pytest.param(lambda: generate_request("", stop=["", LONE]), "stopping.strings[1]", id="stop"),
    pytest.param(lambda: tokenize_request(LONE), "input.text", id="input"),
    pytest.param(
        lambda: generate_request([*CHAT, {"role": "user", "content": LONE}]),
        "prompt.conversation.messages[1].content",
        id="message",
    ),
]


@pytest.mark.parametrize(("build", "field"), TEXTS)
def test_a_lone_surrogate_is_refused_where_it_is(build: Callable[[], object], field: str) -> None:
    with pytest.raises(InvalidTextError, match="character at 1 is a lone surrogate") as caught:
        build()
    assert caught.value.field == field


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_any_other_text_is_sent_as_it_is(text: str) -> None:
    assert pb.GenerateRequest.FromString(generate_request(text).SerializeToString()).prompt.text == text


WRONG = [
    pytest.param(lambda: score_request("", "abc"), "continuations: a str is not a list", id="continuations"),
    pytest.param(lambda: generate_request("", stop="abc"), "stop: a str is not a list", id="stop"),
    pytest.param(lambda: tokenize_request(b"abc"), "input: a bytes is not a list", id="bytes"),
    pytest.param(lambda: generate_request("", n=2), "unknown option: n", id="unknown option"),  # type: ignore[call-arg]
    pytest.param(lambda: tokenize_request([{"role": "user", "text": "x"}]), "has .role. and .content.", id="message"),
]


@pytest.mark.parametrize(("build", "message"), WRONG)
def test_a_mistake_in_a_call_is_a_type_error(build: Callable[[], object], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        build()


CHOICES = [
    ("criterion", "median", "'mean', 'total', 'length_normalized', 'beam_score'"),
    ("early_stopping", True, "'heuristic', 'when_full', 'never'"),
]


@pytest.mark.parametrize(("name", "value", "choices"), CHOICES, ids=["criterion", "early_stopping"])
def test_a_choice_that_there_is_not_is_refused(name: str, value: Any, choices: str) -> None:
    with pytest.raises(ValueError, match=f"{name}: {value!r} is none of {choices}"):
        generate_request("", **{name: value})  # type: ignore[misc]
