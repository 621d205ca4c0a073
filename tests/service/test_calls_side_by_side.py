"""Calls do not harm each other: one that is given up frees its place, one that is read slowly stalls nobody."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest
from harness import Served, Stream, ids, running, text, wait_until
from logprobs.v1 import logprobs_pb2 as pb
from logprobs.v1.logprobs_pb2_grpc import LogprobsServiceStub
from logprobs_server.validation import Validator

LENGTH = 1500
LIMIT = 65_536
TOP = 100
TOLERANCE = 1e-4
FOREVER = pb.Stopping(ignore_eos=True)
LONG_SCORE = pb.ScoreRequest(
    context=text("ab"), continuations=[ids([i % 300] * 1500) for i in range(200)], totals_only=True
)


@pytest.fixture(scope="module")
def served(tiny_folder: Path) -> Iterator[Served]:
    """A server of our own, whose cache nobody else uses, with small messages."""
    with running(tiny_folder, max_sequences=16, max_response_bytes=LIMIT) as served:
        yield served


def generation(seed: int, length: int = LENGTH, **fields: Any) -> pb.GenerateRequest:
    """A stream of that many tokens."""
    sampling = pb.Sampling(temperature=1, seed=seed)
    return pb.GenerateRequest(prompt=text("ab"), max_tokens=length, sampling=sampling, stopping=FOREVER, **fields)


def is_busy(served: Served) -> bool:
    return served.engine.num_free_blocks < served.engine.num_blocks


def cancelled_stream(served: Served) -> None:
    """A stream that its reader gives up after some tokens."""
    call = served.stub.Generate(generation(1, completion_count=8))
    while not next(call).HasField("decoded"):
        pass
    assert is_busy(served)
    call.cancel()
    with pytest.raises(grpc.RpcError) as caught:
        list(call)
    assert caught.value.code() is grpc.StatusCode.CANCELLED


def expired_stream(served: Served) -> None:
    """A stream whose deadline passes."""
    call = served.stub.Generate(generation(1, completion_count=16), timeout=0.3)
    with pytest.raises(grpc.RpcError) as caught:
        list(call)
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED


def unread_stream(served: Served) -> None:
    """A stream that is given up before anything of it is read."""
    call = served.stub.Generate(generation(1, completion_count=8))
    wait_until(lambda: is_busy(served))
    call.cancel()


def disconnected_stream(served: Served) -> None:
    """A stream whose reader is gone."""
    with grpc.insecure_channel(served.target) as channel:
        call = LogprobsServiceStub(channel).Generate(generation(1, completion_count=8))
        assert next(call).HasField("started")
        assert is_busy(served)


def cancelled_score(served: Served) -> None:
    """A long scoring that its caller gives up."""
    call = served.stub.Score.future(LONG_SCORE)
    wait_until(lambda: is_busy(served))
    assert not call.done()
    call.cancel()


def expired_score(served: Served) -> None:
    """A long scoring whose deadline passes."""
    with pytest.raises(grpc.RpcError) as caught:
        served.stub.Score(LONG_SCORE, timeout=0.3)
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED


GIVEN_UP = [cancelled_stream, expired_stream, unread_stream, disconnected_stream, cancelled_score, expired_score]


@pytest.mark.parametrize("give_up", GIVEN_UP)
def test_a_call_that_is_given_up_frees_its_place(give_up: Callable[[Served], None], served: Served) -> None:
    give_up(served)
    served.wait_until_idle()


def test_a_call_that_is_given_up_while_it_waits_leaves_the_queue(tiny_folder: Path) -> None:
    with running(tiny_folder, max_sequences=1, max_queue=8) as served:
        under_way = served.stub.Generate(generation(1, length=2000))
        assert next(under_way).HasField("started")
        for _ in range(20):  # more than the queue holds
            waiting = served.stub.Generate(generation(2, length=2), timeout=0.02)
            with pytest.raises(grpc.RpcError) as caught:
                list(waiting)
            assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        under_way.cancel()
        served.wait_until_idle()


def test_calls_that_are_given_up_leave_the_others_as_they_are(served: Served) -> None:
    requests = [generation(seed, length=200) for seed in range(4)]
    alone = [served.generate(request) for request in requests]
    with ThreadPoolExecutor(len(requests)) as pool:
        calls = [pool.submit(served.generate, request) for request in requests]
        for _ in range(5):
            cancelled_stream(served)
        together = [call.result() for call in calls]
    for one, other in zip(alone, together, strict=True):
        assert one.token_ids() == other.token_ids()
        assert one.text() == other.text()
        numbers = [token.logprob for token in one.tokens()]
        assert [token.logprob for token in other.tokens()] == pytest.approx(numbers, abs=TOLERANCE)


@pytest.fixture(scope="module")
def slow(served: Served) -> tuple[Stream, Stream]:
    """A stream of some megabytes that was not read before the server had all of it; and another, read meanwhile."""
    # What gRPC takes off the wire ahead of its reader stays at 64 KiB.
    options = [("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", LIMIT)]
    with grpc.insecure_channel(served.target, options) as channel:
        request = generation(5, logprobs=pb.LogprobOptions(top_count=TOP, token_ids=range(TOP)))
        call = LogprobsServiceStub(channel).Generate(request)
        first = next(call)
        other = served.generate(generation(6, length=20))
        served.wait_until_idle()  # nothing is computed any more, and little is read
        return Stream([first, *call]), other


def test_a_stream_that_is_not_read_stalls_no_other(slow: tuple[Stream, Stream]) -> None:
    _, other = slow
    assert len(other.token_ids()) == 20


def test_a_stream_that_is_read_late_loses_nothing(slow: tuple[Stream, Stream], served: Served) -> None:
    late, _ = slow
    plain = served.generate(generation(5))
    assert late.token_ids() == plain.token_ids()
    assert late.text() == plain.text()
    assert late.finished().totals.token_count == LENGTH
    assert all(len(token.top) == TOP for token in late.tokens())


def test_a_stream_that_is_read_late_comes_in_fewer_and_larger_messages(slow: tuple[Stream, Stream]) -> None:
    late, _ = slow
    decoded = [response.decoded for response in late.responses if response.HasField("decoded")]
    counts = [sum(len(delta.tokens) for delta in message.deltas) for message in decoded]
    assert sum(counts) == LENGTH
    assert len(decoded) < LENGTH / 2
    assert max(counts) > 5


def test_messages_of_a_stream_that_is_read_late_stay_within_the_limit(slow: tuple[Stream, Stream]) -> None:
    late, _ = slow
    assert sum(response.ByteSize() for response in late.responses) > 10 * LIMIT
    assert max(response.ByteSize() for response in late.responses) <= LIMIT


CONTEXT, FEW, MANY = text("a" * 400), [text("b")] * 2, [text("b")] * 200


def scored(served: Served, continuations: list[pb.Input]) -> None:
    served.score(pb.ScoreRequest(context=CONTEXT, continuations=continuations))


def scored_on_a_stream(served: Served, continuations: list[pb.Input]) -> None:
    request = pb.ScoreRequest(context=CONTEXT, continuations=continuations)
    list(served.stub.ScoreStream(iter([pb.ScoreStreamRequest(id="a", request=request)])))


@pytest.mark.parametrize(("call", "check"), [(scored, "score"), (scored_on_a_stream, "score_item")])
def test_a_small_request_that_is_long_to_tokenise_does_not_hold_up_the_event_loop(
    call: Callable[[Served, list[pb.Input]], None], check: str, served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, on_the_loop = getattr(Validator, check), []

    def watched(validator: Validator, request: Any) -> Any:
        on_the_loop.append(threading.current_thread().name == "server")
        return whole(validator, request)

    monkeypatch.setattr(Validator, check, watched)
    call(served, FEW)
    call(served, MANY)
    assert on_the_loop == [True, False]
