"""Answers of a ScoreStream are put together however they are cut and mixed; a stream that is wrong is refused."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from logprobs import BrokenScoreStreamError, CallError, InvalidRequestError, UnavailableError, Violation
from logprobs.scoring import ScoreAssembler
from logprobs.v1 import logprobs_pb2 as pb

SEQUENCES = st.lists(st.tuples(st.lists(st.integers(0, 9), max_size=6), st.lists(st.integers(-5, 0), max_size=6)))
REQUESTS = st.lists(SEQUENCES, min_size=1, max_size=4)


def sent(count: int) -> tuple[ScoreAssembler, list[str]]:
    """An assembler that has sent requests, and their ids."""
    assembler = ScoreAssembler()
    return assembler, [assembler.send(pb.ScoreRequest()).id for _ in range(count)]


def whole_response(sequences: list[tuple[list[int], list[int]]]) -> pb.ScoreResponse:
    """A response with these token ids and next logprobs."""
    response = pb.ScoreResponse()
    for token_ids, logprobs in sequences:
        sequence = response.sequences.add(tokens=[pb.Token(id=i) for i in token_ids])
        if logprobs:
            sequence.next.logprobs.extend(logprobs)
    return response


@given(REQUESTS, st.randoms(use_true_random=False))
def test_results_do_not_depend_on_how_answers_are_cut_and_mixed(
    requests: list[list[tuple[list[int], list[int]]]], random: object
) -> None:
    assembler, names = sent(len(requests))
    queues = []
    for name, sequences in zip(names, requests, strict=True):
        messages = []
        for index, (token_ids, logprobs) in enumerate(sequences):
            for token_id in token_ids:
                messages.append(pb.ScorePart(sequence=index, tokens=[pb.Token(id=token_id)]))
            for start in range(0, len(logprobs), 2):
                messages.append(pb.ScorePart(sequence=index, next_logprobs=logprobs[start : start + 2]))
        stripped = whole_response([([], []) for _ in sequences])
        queues.append(
            [pb.ScoreStreamResponse(id=name, part=part) for part in messages]
            + [pb.ScoreStreamResponse(id=name, response=stripped)]
        )
    found = {}
    while queues:
        queue = random.choice(queues)  # type: ignore[attr-defined]
        result = assembler.push(queue.pop(0))
        queues = [queue for queue in queues if queue]
        if result is not None:
            found[result.index] = result.response
    assembler.finish()
    assert [found[i] for i in range(len(requests))] == [whole_response(sequences) for sequences in requests]


ERRORS = {
    "rules": (
        pb.ItemError(
            code=3,
            reason="INVALID_REQUEST",
            message="no",
            violations=[pb.FieldViolation(field="request.context", description="must be set")],
        ),
        InvalidRequestError,
        "INVALID_ARGUMENT",
    ),
    "unavailable": (pb.ItemError(code=14, reason="SHUTTING_DOWN", message="no"), UnavailableError, "UNAVAILABLE"),
    "a code of a later time": (pb.ItemError(code=99, reason="NEW", message="no"), CallError, "UNKNOWN"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_an_error_is_that_of_a_call(case: str) -> None:
    told, kind, status = ERRORS[case]
    told.retry_after.FromMilliseconds(1500)
    assembler, [name] = sent(1)
    result = assembler.push(pb.ScoreStreamResponse(id=name, error=told))
    assert result is not None
    assert result.response is None
    error = result.error
    assert type(error) is kind
    assert (error.status, error.reason, error.message, error.retry_after) == (status, told.reason, "no", 1.5)
    assert error.violations == tuple(Violation(v.field, v.description) for v in told.violations)
    assert assembler.num_unanswered == 0


def test_a_result_of_a_kind_that_is_not_known_is_skipped() -> None:
    assembler, [name] = sent(1)
    assert assembler.push(pb.ScoreStreamResponse(id=name)) is None
    assert assembler.num_unanswered == 1


def test_an_answer_to_no_request_is_refused() -> None:
    assembler, [name] = sent(1)
    with pytest.raises(BrokenScoreStreamError, match="an answer to no request, '7'"):
        assembler.push(pb.ScoreStreamResponse(id="7", response=pb.ScoreResponse()))
    assembler.push(pb.ScoreStreamResponse(id=name, response=pb.ScoreResponse()))
    with pytest.raises(BrokenScoreStreamError, match="an answer to no request"):
        assembler.push(pb.ScoreStreamResponse(id=name, response=pb.ScoreResponse()))


@pytest.mark.parametrize("sequence", [-1, 1])
def test_a_part_of_no_sequence_is_refused(sequence: int) -> None:
    assembler, [name] = sent(1)
    assembler.push(pb.ScoreStreamResponse(id=name, part=pb.ScorePart(sequence=sequence, tokens=[pb.Token()])))
    with pytest.raises(BrokenScoreStreamError, match="a part of no sequence"):
        assembler.push(pb.ScoreStreamResponse(id=name, response=pb.ScoreResponse(sequences=[pb.ScoredSequence()])))


def test_a_stream_that_ends_early_is_refused() -> None:
    assembler, names = sent(3)
    assembler.push(pb.ScoreStreamResponse(id=names[1], response=pb.ScoreResponse()))
    with pytest.raises(BrokenScoreStreamError, match="2 requests unanswered"):
        assembler.finish()
