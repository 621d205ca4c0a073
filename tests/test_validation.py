"""Whatever is asked, validation gives a plan that fits the model and the limits, or names the fields that are wrong."""

from __future__ import annotations

from typing import Any

import tiny_tokenizers
from hypothesis import example, given
from hypothesis import strategies as st
from logprobs.v1 import logprobs_pb2 as pb
from logprobs_server.engine.types import ModelDescription
from logprobs_server.errors import InvalidRequestError
from logprobs_server.requests import Limits, ScorePlan
from logprobs_server.text.vocabulary import Vocabulary
from logprobs_server.validation import Validator
from logprobs_server.windows import Windows

CONTEXT = 16
LIMITS = Limits(
    top_count=4,
    completion_count=3,
    beam_count=3,
    stop_strings=2,
    continuations=3,
    alternatives=100,
    request_bytes=1 << 20,
    response_bytes=20_000,
    full_distribution=True,
)
TOKENIZER = tiny_tokenizers.byte_level()
VOCABULARY = Vocabulary(TOKENIZER, size=TOKENIZER.get_vocab_size())
MODEL = ModelDescription(
    name="m",
    revision="r",
    dtype="float32",
    batch_invariant=False,
    vocabulary_size=VOCABULARY.size,
    context_length=CONTEXT,
    eos_token_ids=(1,),
    bos_token_id=None,
)
VALIDATOR = Validator(VOCABULARY, MODEL, LIMITS, None, lambda job: None)

SMALL = st.integers(-1, 5)
IDS = st.builds(lambda ids: pb.TokenIds(ids=ids), st.lists(st.integers(-1, VOCABULARY.size), max_size=20))
GOOD_IDS = st.builds(lambda ids: pb.TokenIds(ids=ids), st.lists(st.integers(0, VOCABULARY.size - 1), max_size=20))
INPUTS: st.SearchStrategy[pb.Input] = st.one_of(
    st.builds(lambda text: pb.Input(text=text), st.text("the horse é字\0", max_size=12)),
    st.builds(lambda ids: pb.Input(token_ids=ids), GOOD_IDS | IDS),
    st.sampled_from(
        [pb.Input(), pb.Input(text="a", add_special_tokens=True), pb.Input(conversation=pb.Conversation())]
    ),
)
OPTIONS = st.builds(
    lambda top, ids, entropy: pb.LogprobOptions(top_count=top, token_ids=ids, entropy=entropy),
    SMALL,
    st.lists(st.integers(0, VOCABULARY.size), max_size=5),
    st.booleans(),
)


def message(kind: Any, required: dict[str, Any], **optional: Any) -> st.SearchStrategy[Any]:
    """Messages whose optional fields are set or not."""
    return st.fixed_dictionaries(required, optional=optional).map(lambda fields: kind(**fields))


SCORES = message(
    pb.ScoreRequest,
    {"context": INPUTS},
    continuations=st.lists(INPUTS, max_size=4),
    logprobs=OPTIONS,
    neutral_context=INPUTS,
    long_input=st.sampled_from([pb.LONG_INPUT_UNSPECIFIED, pb.LONG_INPUT_REFUSE, pb.LONG_INPUT_ROLL]),
    roll_stride=st.integers(-1, 17),
    totals_only=st.booleans(),
    next_token=st.booleans(),
    full_distribution=st.booleans(),
)
GENERATIONS = message(
    pb.GenerateRequest,
    {"prompt": INPUTS},
    max_tokens=SMALL,
    completion_count=SMALL,
    best_of=SMALL,
    sampling=message(
        pb.Sampling,
        {},
        temperature=st.floats(width=32),
        top_p=st.floats(width=32),
        top_k=SMALL,
        min_p=st.floats(width=32),
        seed=st.integers(-1, 2**53),
    ),
    stopping=message(
        pb.Stopping,
        {},
        strings=st.lists(st.text("ab", max_size=3), max_size=3),
        min_tokens=SMALL,
        token_ids=st.lists(SMALL),
    ),
    logprobs=OPTIONS,
    prompt_logprobs=OPTIONS,
)


def check_fields(request: Any, error: InvalidRequestError) -> None:
    """Something is wrong, and it is with fields that the request has."""
    names = {violation.field.partition(".")[0].partition("[")[0] for violation in error.violations}
    assert set() < names <= {field.name for field in request.DESCRIPTOR.fields}
    assert all(violation.description for violation in error.violations)


@given(SCORES)
@example(pb.ScoreRequest(context=pb.Input(text=""), next_token=True))
@example(pb.ScoreRequest(context=pb.Input(token_ids=pb.TokenIds(ids=[3] * 40)), long_input=pb.LONG_INPUT_ROLL))
def test_every_score_request_becomes_a_sound_plan_or_names_wrong_fields(request: pb.ScoreRequest) -> None:
    try:
        plan = VALIDATOR.score(request)
    except InvalidRequestError as error:
        check_fields(request, error)
    else:
        check_plan(request, plan)


def check_plan(request: pb.ScoreRequest, plan: ScorePlan) -> None:
    """Every token is scored once, in its order; nothing is longer than the model's context."""
    assert len(plan.texts) == max(1, len(request.continuations)) == len(plan.own.places)
    assert (plan.neutral is not None) == request.HasField("neutral_context")
    assert not plan.in_parts  # it fits a message, or it is refused
    for job in plan.jobs:
        assert all(len(job.prefix) + len(c.token_ids) <= CONTEXT for c in job.continuations)
    for scoring in filter(None, (plan.own, plan.neutral)):
        for text, places in zip(plan.texts, scoring.places, strict=True):
            told: list[int] = []
            for job_index, branch in places:
                job = scoring.jobs[job_index]
                continuation = job.continuations[branch]
                whole = (*job.prefix, *continuation.token_ids)
                told += whole[max(len(job.prefix) + continuation.scored_from, 1) :]
            unscored = len(text.token_ids) - len(told)
            assert told == list(text.token_ids[unscored:])
            assert unscored == (1 if text.first == 0 and text.token_ids else 0)


@given(SCORES, st.text(max_size=3))
def test_a_streams_request_breaks_the_same_rules(request: pb.ScoreRequest, name: str) -> None:
    item = pb.ScoreStreamRequest(id=name, request=request)
    wrong = _wrong(lambda: VALIDATOR.score(request))
    streamed = _wrong(lambda: VALIDATOR.score_item(item))
    size_alone = wrong == ["logprobs"]  # the answer may come in parts
    assert streamed == ([] if name else ["id"]) + [f"request.{field}" for field in wrong] or size_alone


def _wrong(check: Any) -> list[str]:
    try:
        check()
    except InvalidRequestError as error:
        return [violation.field for violation in error.violations]
    return []


@given(GENERATIONS)
def test_every_generate_request_becomes_a_sound_plan_or_names_wrong_fields(request: pb.GenerateRequest) -> None:
    try:
        plan = VALIDATOR.generate(request, 0.0)
    except InvalidRequestError as error:
        check_fields(request, error)
    else:
        job = plan.job
        assert 1 <= len(job.prompt) <= CONTEXT
        assert 1 <= plan.completion_count <= job.completion_count <= LIMITS.completion_count
        assert job.max_tokens >= job.stopping.min_tokens >= 0
        assert 0 < job.sampling.top_p <= 1
        assert job.sampling.temperature >= 0
        assert job.logprobs.top_count <= LIMITS.top_count


@given(st.integers(0, 200), st.integers(2, 40), st.data())
def test_windows_score_every_token_once_with_as_much_before_it_as_can_be(
    length: int, longest: int, data: st.DataObject
) -> None:
    first = data.draw(st.integers(0, length))
    stride = data.draw(st.integers(1, longest - 1))
    windows = Windows(length=longest, stride=stride)
    if length <= longest:
        assert windows.count(length, first) == 1
        return
    found = list(windows.of(length, first))
    assert len(found) == windows.count(length, first)
    assert [scored for _, _, scored in found] == [first, *(stop for _, stop, _ in found[:-1])]
    assert found[-1][1] == length
    for start, stop, scored in found:
        assert stop - start == longest
        assert scored == 0 or start < scored
    assert all(stop - scored <= stride for _, stop, scored in found[1:])


@given(st.text("the horse é字🙂", max_size=12), st.text("the horse é字🙂", max_size=5))  # few enough for 3 windows
@example("ab é", "字é")
@example("the ho", "rse")
def test_a_continuations_offsets_count_from_its_own_start(context: str, continuation: str) -> None:
    request = pb.ScoreRequest(
        context=pb.Input(text=context), continuations=[pb.Input(text=continuation)], long_input=pb.LONG_INPUT_ROLL
    )
    [text] = VALIDATOR.score(request).texts
    joined, start = b"".join(text.pieces), len(context.encode())
    whole = (context + continuation).encode()
    assert whole.endswith(joined)
    at = len(whole) - len(joined)
    for piece, byte_offset, points in zip(text.pieces, text.byte_offsets, text.code_point_offsets, strict=True):
        assert start + byte_offset == at
        assert len(context) + points == len(whole[:at].decode(errors="ignore"))
        at += len(piece)
    assert text.byte_count == len(continuation.encode())
