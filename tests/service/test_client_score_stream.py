"""The clients' ScoreStream against the service: a result for every request, few in flight, errors where they are."""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
from harness import Served, running, wait_until
from logprobs import (
    AsyncClient,
    Client,
    InvalidRequestError,
    InvalidTextError,
    RequestCancelledError,
    StreamedScore,
    UnavailableError,
    score_request,
)

COUNT = 60
REQUESTS: list[Any] = [
    "the horse" if i % 3 == 0 else [5, i, 7] if i % 3 == 1 else score_request([i], [[7], [8]], totals_only=True)
    for i in range(COUNT)
]


class Counted:
    """Requests that count how many were taken."""

    def __init__(self, requests: list[Any]) -> None:
        self.requests = requests
        self.taken = 0

    def __iter__(self) -> Iterator[Any]:
        for request in self.requests:
            self.taken += 1
            yield request

    async def __aiter__(self) -> AsyncIterator[Any]:
        for request in self:
            yield request


def check(results: list[StreamedScore], client: Client) -> None:
    """All are answered, as Score answers."""
    assert sorted(result.index for result in results) == list(range(COUNT))
    for result in results[::7]:
        assert result.response is not None
        alone = client.score(REQUESTS[result.index], top=2)
        assert [len(s.tokens) for s in result.response.sequences] == [len(s.tokens) for s in alone.sequences]
        for one, other in zip(alone.sequences, result.response.sequences, strict=True):
            assert other.totals.logprob == pytest.approx(one.totals.logprob, abs=1e-3)
            assert all(len(token.top) == 2 for token in other.tokens[1:])


async def test_both_clients_give_a_result_for_every_request(tiny: Served) -> None:
    with Client(tiny.target) as client:
        with client.score_stream(REQUESTS, top=2) as stream:
            check(list(stream), client)
        async with AsyncClient(tiny.target) as async_client:
            for requests in (REQUESTS, Counted(REQUESTS)):
                async with async_client.score_stream(requests, top=2) as async_stream:
                    check([result async for result in async_stream], client)


def test_no_requests_have_no_results(tiny: Served) -> None:
    with Client(tiny.target) as client:
        assert list(client.score_stream([])) == []


async def test_requests_are_taken_as_results_are(tiny: Served) -> None:
    requests = Counted(REQUESTS)
    with Client(tiny.target) as client, client.score_stream(requests, max_in_flight=5) as stream:
        for number, _ in enumerate(stream):
            assert requests.taken <= number + 1 + 5 + 1  # one waits to be sent
    assert requests.taken == COUNT
    requests = Counted(REQUESTS)
    async with AsyncClient(tiny.target) as client_:
        number = 0
        async for _ in client_.score_stream(requests, max_in_flight=5):
            number += 1
            assert requests.taken <= number + 5 + 1
    assert requests.taken == COUNT


async def test_an_error_of_one_request_is_its_result(tiny: Served) -> None:
    requests: list[Any] = ["a", [300], "b"]
    with Client(tiny.target) as client:
        results = {result.index: result for result in client.score_stream(requests)}
    async with AsyncClient(tiny.target) as async_client:
        again = {result.index: result async for result in async_client.score_stream(requests)}
    for found in (results, again):
        assert [found[i].error is None for i in range(3)] == [True, False, True]
        error = found[1].error
        assert isinstance(error, InvalidRequestError)
        assert error.violations[0].field == "request.context.token_ids.ids[0]"


async def test_what_taking_requests_raises_is_raised_after_the_results_of_those_before(tiny: Served) -> None:
    requests = ["a", "b", "\udcff", "c"]
    given: list[int] = []
    with Client(tiny.target) as client:
        stream = client.score_stream(requests)
        given += [next(stream).index, next(stream).index]
        with pytest.raises(InvalidTextError):
            next(stream)
    async with AsyncClient(tiny.target) as async_client:
        async_stream = async_client.score_stream(requests)
        given += [(await anext(async_stream)).index, (await anext(async_stream)).index]
        with pytest.raises(InvalidTextError):
            await anext(async_stream)
    assert sorted(given) == [0, 0, 1, 1]


async def test_a_stream_that_is_left_frees_its_place(tiny_folder: Path) -> None:
    long: list[Any] = [score_request([1], [[i % 300] * 1500 for i in range(16)], totals_only=True)] * 50
    with running(tiny_folder) as served:
        senders: list[threading.Thread] = []
        requests = (senders.append(threading.current_thread()) or request for request in long)  # type: ignore[func-returns-value]
        with Client(served.target) as client, client.score_stream(requests, max_in_flight=2) as stream:
            next(stream)
            assert senders[0].is_alive()
        with pytest.raises(RequestCancelledError):
            next(stream)
        served.wait_until_idle()
        wait_until(lambda: not senders[0].is_alive())
        async with AsyncClient(served.target) as async_client:
            async with async_client.score_stream(long, max_in_flight=2) as async_stream:
                await anext(async_stream)
            with pytest.raises(RequestCancelledError):
                await anext(async_stream)
        served.wait_until_idle()


async def test_a_server_that_is_not_there_is_unavailable() -> None:
    with Client("127.0.0.1:1") as client, pytest.raises(UnavailableError):
        list(client.score_stream(["a"] * 300))
    async with AsyncClient("127.0.0.1:1") as async_client:
        with pytest.raises(UnavailableError):
            _ = [result async for result in async_client.score_stream(["a"] * 300)]


def test_fewer_than_one_in_flight_is_wrong(tiny: Served) -> None:
    with Client(tiny.target) as client, pytest.raises(ValueError, match="max_in_flight: 0 is below 1"):
        client.score_stream(["a"], max_in_flight=0)


def test_the_whole_distribution_arrives_in_one_piece(tiny_folder: Path) -> None:
    with running(tiny_folder, allow_full_distribution=True, max_response_bytes=65_536) as served:
        request = score_request([5], [[i] for i in range(80)], next_token=True, full_distribution=True)
        with Client(served.target) as client:
            [result] = client.score_stream([request])
            assert result.response is not None
            [alone] = client.score([5, 79], next_token=True, full_distribution=True).sequences
    assert [len(sequence.next.logprobs) for sequence in result.response.sequences] == [300] * 80
    assert list(result.response.sequences[79].next.logprobs) == pytest.approx(list(alone.next.logprobs), abs=1e-4)
