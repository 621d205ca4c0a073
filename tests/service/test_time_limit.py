"""A time limit ends a request with what there is of it, and says so. The clock is moved, nobody waits for it."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import pytest
from google.protobuf.duration_pb2 import Duration
from harness import Served, Stream, ids, running, text
from logprobs.v1 import logprobs_pb2 as pb

PROMPT = "The horse raced"
AT_ONCE, SOMETIME = Duration(nanos=1), Duration(seconds=3600)
TIME_LIMIT = pb.FINISH_REASON_TIME_LIMIT


def generation(time_limit: Duration | None = AT_ONCE, **fields: Any) -> pb.GenerateRequest:
    """A request for a hundred sampled tokens with a time limit, but for what is given."""
    stopping = pb.Stopping(ignore_eos=True, time_limit=time_limit)
    given = {"prompt": text(PROMPT), "max_tokens": 100, "sampling": pb.Sampling(seed=3), "stopping": stopping}
    return pb.GenerateRequest(**{**given, **fields})


def generated_until_step(served: Served, last: int, request: pb.GenerateRequest) -> Stream:
    """The stream of a request whose time is up when that step begins, from 0."""
    asked = iter([*[0.0] * last, math.inf])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(served.engine, "_clock", lambda: time.monotonic() + next(asked))
        return served.generate(request)


def test_time_that_is_up_before_anything_is_drawn_gives_empty_completions(tiny: Served) -> None:
    stream = tiny.generate(generation(completion_count=3))
    assert stream.kinds == ["started", *["finished"] * 3, "ranked"]
    for index in range(3):
        finished = stream.finished(index)
        assert (finished.reason, finished.WhichOneof("matched")) == (TIME_LIMIT, None)
        assert finished.totals == pb.Totals(sampling_logprob=0.0)


@pytest.mark.parametrize("last", [1, 2, 9])
def test_time_that_is_up_in_between_gives_the_tokens_drawn_so_far(last: int, tiny: Served) -> None:
    whole = tiny.generate(generation(None))
    stream = generated_until_step(tiny, last, generation(SOMETIME))
    assert stream.token_ids() == whole.token_ids()[:last]
    assert stream.finished().reason == TIME_LIMIT
    assert stream.bytes().decode(errors="replace") == stream.text()
    totals = stream.finished().totals
    assert (totals.token_count, totals.byte_count) == (last, len(stream.bytes()))
    assert totals.logprob == pytest.approx(math.fsum(token.logprob for token in stream.tokens()), rel=1e-6)


def test_what_waits_for_a_stop_string_is_told_when_time_is_up(tiny: Served) -> None:
    plain = generated_until_step(tiny, 6, generation(SOMETIME))
    stopping = pb.Stopping(ignore_eos=True, time_limit=SOMETIME, strings=[plain.text() + "never"])
    stream = generated_until_step(tiny, 6, generation(stopping=stopping))
    assert stream.kinds == ["started", "decoded", "finished"]
    assert (stream.text(), stream.token_ids()) == (plain.text(), plain.token_ids())


def test_a_prompt_is_told_as_far_as_it_was_scored(tiny_folder: Path) -> None:
    prompt = [1 + index % 200 for index in range(50)]
    request = generation(SOMETIME, prompt=ids(prompt), prompt_logprobs=pb.LogprobOptions())
    with running(tiny_folder, max_sequences=16, max_step_tokens=16) as served:
        stream = generated_until_step(served, 2, request)
    assert [token.id for token in stream.prompt_tokens] == prompt[:33]
    assert set(stream.kinds) == {"started", "prompt_scored", "finished"}
    assert stream.finished().reason == TIME_LIMIT


def test_a_request_that_waits_in_the_queue_is_answered_when_its_time_is_up(tiny_folder: Path) -> None:
    with running(tiny_folder, max_sequences=1) as served:
        first = served.stub.Generate(generation(None, max_tokens=2000))
        next(iter(first))
        waiting = served.generate(generation(completion_count=2))
        assert served.engine.num_free_blocks < served.engine.num_blocks
        first.cancel()
    assert waiting.kinds == ["started", "finished", "finished", "ranked"]
    assert [waiting.finished(index).reason for index in range(2)] == [TIME_LIMIT] * 2


def test_a_completion_without_tokens_ranks_last_whatever_the_criterion(tiny_folder: Path) -> None:
    for criterion in (
        pb.RANKING_CRITERION_MEAN_LOGPROB,
        pb.RANKING_CRITERION_TOTAL_LOGPROB,
        pb.RANKING_CRITERION_LENGTH_NORMALIZED,
    ):
        request = generation(SOMETIME, completion_count=3, ranking=pb.Ranking(criterion=criterion))
        with running(tiny_folder, max_sequences=2) as served:
            stream = generated_until_step(served, 4, request)
        last = stream.ranked.completions[-1]
        assert (last.completion, last.value, last.totals.token_count) == (2, -math.inf, 0)
        assert all(place.totals.token_count > 0 for place in stream.ranked.completions[:-1])


def test_the_best_of_what_there_is_are_told(tiny: Served) -> None:
    stream = generated_until_step(tiny, 5, generation(SOMETIME, completion_count=1, best_of=6))
    best = stream.ranked.completions[0].completion
    assert stream.kinds == ["started", "decoded", "finished", "ranked"]
    assert (stream.finished(best).reason, len(stream.tokens(best))) == (TIME_LIMIT, 5)


def test_time_enough_changes_nothing(tiny: Served) -> None:
    one, other = tiny.generate(generation(SOMETIME)), tiny.generate(generation(None))
    assert one.token_ids() == other.token_ids()
    assert one.finished().reason == pb.FINISH_REASON_MAX_TOKENS


def test_what_has_run_out_of_time_holds_nothing(tiny: Served) -> None:
    generated_until_step(tiny, 3, generation(SOMETIME, completion_count=4))
    tiny.generate(generation())
    tiny.wait_until_idle()
