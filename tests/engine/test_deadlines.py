"""A job whose time is up ends within one step with what there is of it; the others do not notice. No test waits."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
from fakes import FakeModel, Listener, generate_job, running_engine
from logprobs_server.engine.engine import TorchEngine
from logprobs_server.engine.events import (
    CompletionDecoded,
    CompletionFinished,
    FinishReason,
    JobFinished,
    JobStarted,
    PromptScored,
)
from logprobs_server.engine.types import GenerateJob, LogprobOptions, StoppingOptions

PROMPT = tuple(b"The horse raced past the barn")
DEADLINE_S = 100.0


def limited(**given: Any) -> GenerateJob:
    """A long job with a deadline."""
    stopping = StoppingOptions(ignore_eos=True, deadline_s=DEADLINE_S)
    return generate_job(PROMPT, **{"max_tokens": 100, "stopping": stopping, **given})


@contextmanager
def engine_late_at(last_pass: int, **limits: int) -> Iterator[tuple[TorchEngine, FakeModel, threading.Event]]:
    """An engine whose clock passes the deadline during that pass, from 0; nothing runs before the event is set."""
    now, ready, model = [0.0], threading.Event(), FakeModel(num_blocks=120)

    def move_clock(num_forwards: int) -> None:
        ready.wait()
        if num_forwards == last_pass:
            now[0] = DEADLINE_S

    model.before_forward = move_clock
    with running_engine(model, clock=lambda: now[0], **limits) as engine:
        yield engine, model, ready


def deltas(listener: Listener) -> list[CompletionDecoded]:
    """What was decoded, event by event."""
    return [event for event in listener.wait() if isinstance(event, CompletionDecoded)]


def ends(listener: Listener) -> list[CompletionFinished]:
    """How each completion ended, in the order they did."""
    return [event for event in listener.wait() if isinstance(event, CompletionFinished)]


@pytest.mark.parametrize("last_pass", [0, 1, 7])
def test_a_completion_ends_within_one_step_with_the_tokens_that_there_are(last_pass: int) -> None:
    with engine_late_at(last_pass) as (engine, model, ready):
        ready.set()
        listener = Listener(engine, limited())
        drawn = listener.token_ids()
        assert model.num_forwards == last_pass + 1
    with running_engine(FakeModel()) as engine:
        whole = Listener(engine, generate_job(PROMPT, max_tokens=100))
        assert drawn == whole.token_ids()[: last_pass + 1]
        assert listener.tokens() == whole.tokens()[: last_pass + 1]
    [end] = ends(listener)
    assert (end.reason, end.token_count) == (FinishReason.TIME_LIMIT, last_pass + 1)
    assert end.logprob == pytest.approx(sum(token.position.logprob or 0.0 for token in listener.tokens()))
    assert isinstance(listener.events[-1], JobFinished)


def test_text_that_waits_for_a_stop_string_is_told() -> None:
    with engine_late_at(5) as (engine, _, ready):
        ready.set()
        plain = Listener(engine, limited())
        text = "".join(delta.text for delta in deltas(plain))
    stopping = StoppingOptions(ignore_eos=True, deadline_s=DEADLINE_S, strings=(text + "never",))
    with engine_late_at(5) as (engine, _, ready):
        ready.set()
        [delta] = deltas(Listener(engine, limited(stopping=stopping)))
    assert delta.text == text
    assert list(delta.tokens) == plain.tokens()


def test_a_job_that_waits_is_started_and_ended_while_the_one_before_it_runs() -> None:
    with engine_late_at(3, max_sequences=1) as (engine, _, ready):
        first = Listener(engine, generate_job(PROMPT, max_tokens=30))
        waiting = Listener(engine, limited(count=3))
        ready.set()
        told = waiting.wait()
        assert not first.events or not isinstance(first.events[-1], JobFinished)
        assert len(first.token_ids()) == 30
    assert [type(event) for event in told] == [JobStarted, *[CompletionFinished] * 3, JobFinished]
    assert [(end.index, end.reason, end.token_count, end.byte_count, end.logprob) for end in ends(waiting)] == [
        (index, FinishReason.TIME_LIMIT, 0, 0, 0.0) for index in range(3)
    ]


def test_a_job_that_is_late_when_it_comes_ends_without_a_pass() -> None:
    with running_engine(model := FakeModel(), clock=lambda: DEADLINE_S) as engine:
        assert [end.token_count for end in ends(Listener(engine, limited()))] == [0]
    assert model.num_forwards == 0


def test_completions_that_have_not_started_end_beside_those_that_have() -> None:
    with engine_late_at(4, max_sequences=2) as (engine, _, ready):
        ready.set()
        listener = Listener(engine, limited(count=5))
        assert [(end.index, end.reason) for end in ends(listener)] == [
            (index, FinishReason.TIME_LIMIT) for index in range(5)
        ]
        assert [len(listener.token_ids(index)) > 0 for index in range(5)] == [True, True, False, False, False]


def test_completions_that_ended_before_keep_their_end() -> None:
    stopping = StoppingOptions(token_ids=tuple(range(0, 256, 4)), deadline_s=DEADLINE_S)
    with engine_late_at(6) as (engine, _, ready):
        ready.set()
        told = ends(Listener(engine, limited(count=8, stopping=stopping)))
    assert sorted(end.index for end in told) == list(range(8))
    assert {end.reason for end in told} == {FinishReason.STOP_TOKEN, FinishReason.TIME_LIMIT}


def test_a_prompt_is_told_as_far_as_it_was_scored() -> None:
    with engine_late_at(1, max_step_tokens=8) as (engine, _, ready):
        ready.set()
        listener = Listener(engine, limited(prompt_logprobs=LogprobOptions()))
        [end] = ends(listener)
    scored = [position for event in listener.events if isinstance(event, PromptScored) for position in event.positions]
    assert (end.reason, end.token_count) == (FinishReason.TIME_LIMIT, 0)
    assert [position.token_id for position in scored] == list(PROMPT[1:17])


def test_the_others_do_not_notice() -> None:
    jobs = [generate_job(PROMPT, count=2, seed=5), limited(), generate_job(PROMPT, seed=9), limited(count=3)]
    with engine_late_at(5, max_sequences=6) as (engine, _, ready):
        listeners = [Listener(engine, job) for job in jobs]
        ready.set()
        for listener in listeners:
            listener.wait()
    for job, listener in zip(jobs, listeners, strict=True):
        if job.stopping.deadline_s is None:
            with running_engine(FakeModel()) as engine:
                assert Listener(engine, job).token_ids() == listener.token_ids()
        else:
            assert {end.reason for end in ends(listener)} == {FinishReason.TIME_LIMIT}


def test_a_deadline_that_is_not_reached_changes_nothing() -> None:
    job = limited(max_tokens=20, count=2)
    with running_engine(FakeModel(), clock=lambda: DEADLINE_S - 1) as engine:
        one = Listener(engine, job)
        other = Listener(engine, replace(job, stopping=replace(job.stopping, deadline_s=None)))
        assert [one.tokens(index) for index in range(2)] == [other.tokens(index) for index in range(2)]
        assert {end.reason for end in ends(one)} == {FinishReason.MAX_TOKENS}
