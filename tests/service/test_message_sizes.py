"""No message passes its limit: requests are refused, answers that could be too large are refused beforehand."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.message import Message
from harness import GREEDY, Served, answer, ids, refusal, running, text
from logprobs.v1 import logprobs_pb2 as pb

LIMIT = 65_536
BROKEN_BYTE = b"\x80"


@pytest.fixture(scope="module")
def small(tiny_folder: Path) -> Iterator[Served]:
    """A server with the smallest answers there can be."""
    with running(
        tiny_folder, max_response_bytes=LIMIT, max_request_bytes=4 * LIMIT, max_continuations=100_000
    ) as served:
        yield served


def options(**fields: Any) -> pb.LogprobOptions:
    return pb.LogprobOptions(**fields)


GROWING: dict[str, tuple[Callable[[int], Any], int]] = {
    "Score": (lambda n: pb.ScoreRequest(context=ids([5] * n)), 2048),
    "Score, alternatives": (
        lambda n: pb.ScoreRequest(
            context=ids([5] * n), logprobs=options(top_count=50, token_ids=range(50), entropy=True), next_token=True
        ),
        2048,
    ),
    "Score, short continuations": (
        lambda n: pb.ScoreRequest(context=text("ab"), continuations=[text("c")] * n),
        2048,
    ),
    "Score, totals only": (
        lambda n: pb.ScoreRequest(context=text("ab"), continuations=[text("c")] * n, totals_only=True),
        2048,
    ),
    "Score, empty continuations": (
        lambda n: pb.ScoreRequest(context=text("ab"), continuations=[text("")] * n),
        8192,
    ),
    "Score, what follows empty continuations": (
        lambda n: pb.ScoreRequest(
            context=text("ab"), continuations=[text("")] * n, logprobs=options(top_count=9), next_token=True
        ),
        2048,
    ),
    "Tokenize": (lambda n: pb.TokenizeRequest(input=text("x" * n)), 8192),
    "Detokenize": (lambda n: pb.DetokenizeRequest(token_ids=[5] * n), 65_536),
}
"""Requests whose answers grow with a number, and a number for which they are too large."""


@pytest.mark.parametrize("case", GROWING)
def test_an_answer_fits_or_is_refused_beforehand(case: str, small: Served) -> None:
    request, too_large = GROWING[case]
    fitting = 1
    while too_large - fitting > 1:  # to where the one becomes the other
        middle = (fitting + too_large) // 2
        if _is_refused(small, request(middle)):
            too_large = middle
        else:
            fitting = middle
    assert _is_refused(small, request(too_large))
    response: Message = answer(small, request(fitting))
    assert LIMIT // 20 < response.ByteSize() <= LIMIT


def _is_refused(served: Served, request: Any) -> bool:
    code = grpc.StatusCode.OK
    try:
        answer(served, request)
    except grpc.RpcError as error:
        code = error.code()
    assert code in (grpc.StatusCode.OK, grpc.StatusCode.INVALID_ARGUMENT)
    return code is grpc.StatusCode.INVALID_ARGUMENT


def test_detokenized_broken_bytes_fit_or_are_refused_beforehand(small: Served) -> None:
    broken = next(
        i for i in range(300) if small.stub.Detokenize(pb.DetokenizeRequest(token_ids=[i])).bytes == BROKEN_BYTE
    )
    for count in range(LIMIT // 4 - 16, LIMIT // 4 + 1):  # each is one byte, and three as U+FFFD
        request = pb.DetokenizeRequest(token_ids=[broken] * count)
        if not _is_refused(small, request):
            assert small.stub.Detokenize(request).ByteSize() <= LIMIT


def test_a_refusal_tells_the_size_and_the_limit(small: Served) -> None:
    refused = refusal(lambda: answer(small, pb.ScoreRequest(context=ids([5] * 2048))))
    [(field, description)] = refused.violations
    assert field == "logprobs"
    assert description.startswith("the answer could need ")
    assert description.endswith("this server's limit is 65,536")


def test_totals_of_a_text_fit_whose_tokens_would_not(small: Served) -> None:
    [sequence] = small.score(pb.ScoreRequest(context=ids([5] * 2048), totals_only=True))
    assert sequence.totals.token_count == 2047


def test_a_request_message_over_the_limit_is_refused(small: Served) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        small.stub.Tokenize(pb.TokenizeRequest(input=text("x" * 4 * LIMIT)))
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


def test_a_scored_prompt_travels_in_as_many_messages_as_needed(small: Served) -> None:
    prompt = [i % 300 for i in range(2000)]
    stream = small.generate(
        pb.GenerateRequest(prompt=ids(prompt), max_tokens=1, prompt_logprobs=options(top_count=50), sampling=GREEDY)
    )
    parts = [r.prompt_scored for r in stream.responses if r.HasField("prompt_scored")]
    assert len(parts) > 2000 * 50 * 10 // LIMIT
    assert max(response.ByteSize() for response in stream.responses) <= LIMIT
    assert [token.id for token in stream.prompt_tokens] == prompt
    assert all(len(token.top) == 50 for token in stream.prompt_tokens[1:])


def test_tokens_that_a_stop_string_held_back_travel_in_as_many_messages_as_needed(small: Served) -> None:
    fields: dict[str, Any] = {
        "max_tokens": 300,
        "logprobs": options(top_count=100),
        "sampling": GREEDY,
        "prompt": text("ab"),
    }
    plain = small.generate(pb.GenerateRequest(**fields))
    held = plain.text()[:200]
    stopping = pb.Stopping(strings=[held + "\x00"])  # is looked for until it cannot come any more
    stream = small.generate(pb.GenerateRequest(**fields, stopping=stopping))
    assert max(response.ByteSize() for response in stream.responses) <= LIMIT
    assert stream.tokens() == plain.tokens()
    assert stream.text() == plain.text()
