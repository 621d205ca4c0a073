"""Server-side best_of: more completions are drawn than are told; the best are, whole, and every draw is ranked."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from harness import Served, Stream, ids, running, uniform
from logprobs.v1 import logprobs_pb2 as pb
from logprobs_server.engine.events import CompletionFinished, Event
from logprobs_server.engine.types import Job, Sink, Ticket

PROMPT = ids([72, 105, 81])
SEED, DRAWS, TOLD = 7, 9, 3
TOLERANCE = 1e-3
STOPPING = pb.Stopping(token_ids=range(1, 40))  # so that lengths differ
CRITERIA: dict[str, tuple[pb.Ranking | None, Callable[[pb.Totals], float]]] = {
    "default": (None, lambda t: t.logprob / t.token_count),
    "mean": (pb.Ranking(criterion=pb.RANKING_CRITERION_MEAN_LOGPROB), lambda t: t.logprob / t.token_count),
    "total": (pb.Ranking(criterion=pb.RANKING_CRITERION_TOTAL_LOGPROB), lambda t: t.logprob),
    "normalized": (
        pb.Ranking(criterion=pb.RANKING_CRITERION_LENGTH_NORMALIZED, length_exponent=0.5),
        lambda t: t.logprob / math.sqrt(t.token_count),
    ),
}


def generation(**fields: Any) -> pb.GenerateRequest:
    """Three of nine uniform draws of up to 40 tokens, but for what is given."""
    given = {"prompt": PROMPT, "max_tokens": 40, "sampling": uniform(SEED), "stopping": STOPPING}
    return pb.GenerateRequest(**{**given, "completion_count": TOLD, "best_of": DRAWS, **fields})


@pytest.fixture(scope="module")
def alone(tiny: Served) -> Sequence[Stream]:
    """Every draw as a request of its own."""
    return [
        tiny.generate(generation(completion_count=1, best_of=1, sampling=uniform(SEED + index)))
        for index in range(DRAWS)
    ]


@pytest.mark.parametrize("name", CRITERIA)
def test_the_best_draws_by_the_criterion_are_told_and_all_are_ranked(
    name: str, tiny: Served, alone: Sequence[Stream]
) -> None:
    ranking, value = CRITERIA[name]
    stream = tiny.generate(generation(ranking=ranking))
    totals = [one.finished().totals for one in alone]
    assert len({total.token_count for total in totals}) > 3
    order = sorted(range(DRAWS), key=lambda index: -value(totals[index]))
    assert [place.completion for place in stream.ranked.completions] == order
    for place in stream.ranked.completions:
        expected = totals[place.completion]
        assert (place.totals.token_count, place.totals.byte_count) == (expected.token_count, expected.byte_count)
        assert place.totals.logprob == pytest.approx(expected.logprob, abs=TOLERANCE)
        assert place.value == pytest.approx(value(expected), abs=TOLERANCE)
    told = [response.finished.completion for response in stream.responses if response.HasField("finished")]
    assert told == order[:TOLD]


def test_a_winner_is_the_single_completion_of_its_seed(tiny: Served, alone: Sequence[Stream]) -> None:
    stream = tiny.generate(generation())
    for place in stream.ranked.completions[:TOLD]:
        index = place.completion
        assert stream.token_ids(index) == alone[index].token_ids()
        assert stream.text(index) == alone[index].text()
        assert stream.finished(index).reason == alone[index].finished().reason


def test_winners_come_one_after_the_other_best_first_and_losers_not_at_all(tiny: Served) -> None:
    stream = tiny.generate(generation(prompt_logprobs=pb.LogprobOptions()))
    order = [place.completion for place in stream.ranked.completions]
    events = [
        ("decoded", [delta.completion for delta in response.decoded.deltas])
        if response.HasField("decoded")
        else (response.WhichOneof("event"), [response.finished.completion] if response.HasField("finished") else [])
        for response in stream.responses
    ]
    winners = [(kind, [index]) for index in order[:TOLD] for kind in ("decoded", "finished")]
    assert [event for event in events if event[0] != "prompt_scored"] == [("started", []), *winners, ("ranked", [])]
    assert len(stream.prompt_tokens) == 3
    assert stream.kinds.index("decoded") > max(i for i, kind in enumerate(stream.kinds) if kind == "prompt_scored")


def test_the_start_tells_how_many_completions_follow(tiny: Served) -> None:
    started = tiny.generate(generation()).started
    assert (started.completion_count, started.seed) == (TOLD, SEED)


def test_nothing_decoded_is_sent_until_all_are_drawn(tiny: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    submit, finished = tiny.engine.submit, list[Event]()

    def overheard(job: Job, sink: Sink) -> Ticket:
        def hear(events: Sequence[Event]) -> None:
            finished.extend(event for event in events if isinstance(event, CompletionFinished))
            sink(events)

        return submit(job, hear)

    monkeypatch.setattr(tiny.engine, "submit", overheard)
    for response in tiny.stub.Generate(generation()):
        assert response.HasField("started") or len(finished) == DRAWS


def test_one_of_several_draws_is_told_and_ranked(tiny: Served, alone: Sequence[Stream]) -> None:
    stream = tiny.generate(generation(completion_count=1))
    best = stream.ranked.completions[0].completion
    assert stream.kinds == ["started", "decoded", "finished", "ranked"]
    assert len(stream.ranked.completions) == DRAWS
    assert stream.token_ids(best) == alone[best].token_ids()


def test_as_many_as_are_told_are_streamed_while_they_are_drawn(tiny: Served) -> None:
    plain = tiny.generate(generation(completion_count=DRAWS, best_of=None))
    stream = tiny.generate(generation(completion_count=DRAWS, best_of=DRAWS))
    assert stream.kinds.index("finished") < stream.kinds.index("ranked") - DRAWS
    assert [stream.token_ids(i) for i in range(DRAWS)] == [plain.token_ids(i) for i in range(DRAWS)]


def test_equal_draws_are_ranked_by_index(tiny: Served) -> None:
    stream = tiny.generate(generation(sampling=pb.Sampling(temperature=0, seed=SEED)))
    assert [place.completion for place in stream.ranked.completions] == list(range(DRAWS))
    assert stream.token_ids(0) == stream.token_ids(1) == stream.token_ids(2)


def test_a_winner_too_large_for_a_message_is_told_in_several(tiny_folder: Path, tiny: Served) -> None:
    request = generation(stopping=None, max_tokens=100, logprobs=pb.LogprobOptions(top_count=50))
    with running(tiny_folder, max_response_bytes=64 << 10) as served:
        stream = served.generate(request)
    best = stream.ranked.completions[0].completion
    assert max(response.ByteSize() for response in stream.responses) <= 64 << 10
    assert stream.kinds.count("decoded") > TOLD
    assert stream.token_ids(best) == tiny.generate(request).token_ids(best)
