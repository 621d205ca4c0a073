"""The engine gives every job what it would give it alone, ends it when it should, and keeps nothing of it."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from fakes import (
    EOS,
    VOCABULARY_SIZE,
    FakeModel,
    Listener,
    generate_job,
    nan_after,
    random_logits,
    running_engine,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from logprobs_server.engine.engine import tell_each
from logprobs_server.engine.events import (
    CompletionDecoded,
    CompletionFinished,
    ContinuationScored,
    Event,
    FinishReason,
    JobStarted,
    PromptScored,
)
from logprobs_server.engine.kv_cache import BLOCK_SIZE
from logprobs_server.engine.types import (
    Continuation,
    EngineUnavailableError,
    Job,
    LogprobOptions,
    ScoreJob,
    StoppingOptions,
    Told,
)
from torch import Tensor

PROMPT = tuple(b"The horse raced past the barn")
OTHERS = tuple(tuple(text.encode()) for text in ("a", "Paris", "0123456789abcdef", "another prompt of 33 characters. "))
IDS = st.lists(st.integers(0, 255), min_size=1, max_size=40).map(tuple)


def score_job(prefix: Sequence[int], *continuations: Sequence[int], next_token: bool = False) -> ScoreJob:
    """Scores all tokens of some continuations of a prefix."""
    options = LogprobOptions(top_count=3, token_ids=(7,), entropy=True)
    return ScoreJob(
        prefix=tuple(prefix),
        continuations=tuple(Continuation(token_ids=tuple(ids)) for ids in continuations),
        logprobs=options,
        next_logprobs=options if next_token else None,
    )


def expected_logprobs(token_ids: Sequence[int]) -> list[float]:
    """Of every token but the first, from the chosen logits alone."""
    rows = [random_logits(tuple(token_ids[:end])).double().log_softmax(0) for end in range(1, len(token_ids))]
    return [float(row[token_id]) for row, token_id in zip(rows, token_ids[1:], strict=True)]


def alone(job: Job) -> Listener:
    """The job, done with nothing beside it."""
    with running_engine(FakeModel()) as engine:
        listener = Listener(engine, job)
        listener.wait()
    return listener


@settings(max_examples=25)
@given(IDS, st.lists(IDS, min_size=1, max_size=4), st.integers(1, 40), st.integers(1, 6))
def test_scores_are_those_of_the_logits_however_prompts_are_cut(
    prefix: tuple[int, ...], continuations: list[tuple[int, ...]], step_tokens: int, sequences: int
) -> None:
    with running_engine(FakeModel(), max_step_tokens=step_tokens, max_sequences=sequences) as engine:
        listener = Listener(engine, score_job(prefix, *continuations))
        for index, continuation in enumerate(continuations):
            told = listener.scored(index)
            assert [position.token_id for position in told] == list(continuation)
            exact = expected_logprobs(prefix + continuation)[len(prefix) - 1 :]
            assert [position.logprob for position in told] == pytest.approx(exact, abs=1e-5)


@settings(max_examples=25)
@given(IDS, st.integers(1, 5), st.integers(1, 40), st.integers(1, 6))
def test_completions_do_not_depend_on_how_much_a_step_computes(
    prompt: tuple[int, ...], count: int, step_tokens: int, sequences: int
) -> None:
    job = generate_job(prompt, count=count, max_tokens=18)
    with running_engine(FakeModel(), max_step_tokens=step_tokens, max_sequences=sequences) as engine:
        listener = Listener(engine, job)
        told = [listener.tokens(index) for index in range(count)]
    one = alone(job)
    assert told == [one.tokens(index) for index in range(count)]


def test_jobs_side_by_side_get_what_each_gets_alone() -> None:
    jobs: list[Job] = [generate_job(prompt, count=2, seed=5) for prompt in OTHERS]
    jobs += [score_job(prompt, PROMPT, (1, 2, 3), next_token=True) for prompt in OTHERS]
    with running_engine(FakeModel(), max_sequences=5, max_step_tokens=16) as engine:
        together = [Listener(engine, job) for job in jobs]
        for listener in together:
            listener.wait()
    for listener, job in zip(together, jobs, strict=True):
        one = alone(job)
        for index in range(2):
            assert listener.tokens(index) == one.tokens(index)
            assert listener.scored(index) == one.scored(index)


@pytest.mark.parametrize(
    "cuts",
    [
        {},
        {"top_k": 5},
        {"top_p": 0.8},
        {"min_p": 0.05},
        {"typical_p": 0.7},
        {"repetition_penalty": 1.3, "presence_penalty": 0.2, "frequency_penalty": 0.4, "logit_bias": ((5, 3.0),)},
    ],
    ids=str,
)
def test_completion_i_of_seed_s_is_the_completion_of_seed_s_plus_i(cuts: dict[str, Any]) -> None:
    with running_engine(FakeModel(num_blocks=120)) as engine:
        many = Listener(engine, generate_job(PROMPT, count=20, seed=100, **cuts))
        single = [Listener(engine, generate_job(PROMPT, seed=100 + index, **cuts)) for index in range(20)]
        assert [many.tokens(index) for index in range(20)] == [one.tokens() for one in single]
        assert len({tuple(one.token_ids()) for one in single}) == 20


def test_logprobs_of_generated_tokens_are_those_of_scoring_them() -> None:
    with running_engine(FakeModel()) as engine:
        generated = Listener(engine, generate_job(PROMPT))
        scored = Listener(engine, score_job(PROMPT, generated.token_ids()))
        told = [p.logprob for p in scored.scored()]  # torch's own reductions differ in the last bit with company
        assert [token.position.logprob for token in generated.tokens()] == pytest.approx(told, abs=1e-6)


def test_tokens_before_scored_from_are_not_told() -> None:
    ids = (*PROMPT, *OTHERS[3])
    job = replace(score_job((), ids), continuations=(Continuation(token_ids=ids, scored_from=len(PROMPT)),))
    with running_engine(FakeModel(), max_step_tokens=8) as engine:
        assert [position.token_id for position in Listener(engine, job).scored()] == list(OTHERS[3])


@pytest.mark.parametrize("continuation", [(), (1,), OTHERS[3]], ids=len)
def test_the_next_tokens_distribution_is_that_after_the_last_token(continuation: tuple[int, ...]) -> None:
    with running_engine(FakeModel(), max_step_tokens=8) as engine:
        events = Listener(engine, score_job(PROMPT, continuation, next_token=True)).wait()
    [following] = [e.next_token for e in events if isinstance(e, ContinuationScored) and e.next_token is not None]
    exact = random_logits((*PROMPT, *continuation)).double().log_softmax(0)
    assert following.token_id is None
    assert list(following.top_ids) == exact.topk(3).indices.tolist()
    assert list(following.named_logprobs) == pytest.approx([exact[7].item()], abs=1e-5)


def test_prompt_positions_are_told_in_order_before_the_first_drawn_token() -> None:
    with running_engine(FakeModel(), max_step_tokens=8) as engine:
        events = Listener(engine, generate_job(PROMPT, count=2, prompt_logprobs=LogprobOptions())).wait()
    told = [position for event in events if isinstance(event, PromptScored) for position in event.positions]
    assert [position.token_id for position in told] == list(PROMPT[1:])
    assert [position.logprob for position in told] == pytest.approx(expected_logprobs(PROMPT), abs=1e-5)
    kinds = [type(event) for event in events]
    last = len(kinds) - 1 - kinds[::-1].index(PromptScored)
    assert kinds[: last + 1] == [JobStarted] + last * [PromptScored]


def test_nothing_drawn_still_tells_the_prompt_and_an_end() -> None:
    with running_engine(FakeModel()) as engine:
        events = Listener(engine, generate_job(PROMPT, max_tokens=0, prompt_logprobs=LogprobOptions())).wait()
    assert sum(len(event.positions) for event in events if isinstance(event, PromptScored)) == len(PROMPT) - 1
    [finished] = [event for event in events if isinstance(event, CompletionFinished)]
    assert (finished.token_count, finished.logprob, finished.reason) == (0, 0.0, FinishReason.MAX_TOKENS)


def _prefers_eos(history: tuple[int, ...]) -> Tensor:
    return torch.nn.functional.one_hot(torch.tensor(EOS), VOCABULARY_SIZE) * 50.0


@pytest.mark.parametrize(
    ("stopping", "num_tokens", "reason"),
    [
        (StoppingOptions(), 1, FinishReason.END_OF_SEQUENCE),
        (StoppingOptions(min_tokens=6), 7, FinishReason.END_OF_SEQUENCE),
        (StoppingOptions(ignore_eos=True), 20, FinishReason.MAX_TOKENS),
        (StoppingOptions(ignore_eos=True, token_ids=(EOS,), min_tokens=3), 4, FinishReason.STOP_TOKEN),
    ],
    ids=["eos", "min tokens", "ignored", "stop token"],
)
def test_what_ends_a_completion(stopping: StoppingOptions, num_tokens: int, reason: FinishReason) -> None:
    with running_engine(FakeModel(_prefers_eos)) as engine:
        listener = Listener(engine, generate_job(PROMPT, stopping=stopping))
        assert len(listener.token_ids()) == num_tokens
    [finished] = [event for event in listener.events if isinstance(event, CompletionFinished)]
    assert (finished.reason, finished.token_count) == (reason, num_tokens)


def test_no_token_left_to_draw_ends_the_job_that_met_it_and_no_other() -> None:
    def only_zero(history: tuple[int, ...]) -> Tensor:
        found = random_logits(history)
        return found.index_fill(0, torch.arange(1, VOCABULARY_SIZE), -torch.inf) if history[-1] == 255 else found

    banned = ((0, -torch.inf),)
    with running_engine(FakeModel(only_zero)) as engine:
        bad = [Listener(engine, generate_job((255,), temperature=t, logit_bias=banned)) for t in (0.0, 1.0)]
        good = Listener(engine, generate_job(PROMPT, logit_bias=(*banned, (255, -torch.inf))))
        assert [listener.failure() for listener in bad] == ["NOTHING_TO_DRAW"] * 2
        assert good.failure() is None
        assert engine.num_free_blocks == engine.num_blocks


def test_a_completion_ends_where_the_context_is_full() -> None:
    with running_engine(FakeModel(context_length=len(PROMPT) + 5)) as engine:
        listener = Listener(engine, generate_job(PROMPT, max_tokens=6))
        assert len(listener.token_ids()) == 5
    [finished] = [event for event in listener.events if isinstance(event, CompletionFinished)]
    assert finished.reason is FinishReason.CONTEXT_FULL


def test_nan_ends_the_job_that_met_it_and_no_other() -> None:
    jobs: list[Job] = [score_job(PROMPT, (1, 255, 2)), score_job((255,), (1,)), generate_job((3, 255))]
    with running_engine(FakeModel(nan_after(255))) as engine:
        good = [Listener(engine, generate_job(PROMPT, seed=3)), Listener(engine, score_job(PROMPT, (1, 2, 255)))]
        bad = [Listener(engine, job) for job in jobs]
        assert [listener.failure() for listener in bad] == ["MODEL_YIELDED_NAN"] * len(jobs)
        assert [listener.failure() for listener in good] == [None, None]
        assert engine.num_free_blocks == engine.num_blocks


@pytest.mark.parametrize("job", [generate_job(PROMPT, max_tokens=200, count=4), score_job(PROMPT, PROMPT)], ids=type)
@pytest.mark.parametrize("last_forward", [0, 2, 5])
def test_a_cancelled_job_is_forgotten_within_a_step(job: Job, last_forward: int) -> None:
    model = FakeModel()
    with running_engine(model, max_sequences=4, max_step_tokens=4) as engine:
        listeners: list[Listener] = []
        submitted = threading.Event()
        told: list[Event] = []

        def cancel(num_forwards: int) -> None:
            submitted.wait()
            if num_forwards == last_forward:
                told.extend(listeners[0].events)
                engine.cancel(listeners[0].ticket)

        model.before_forward = cancel
        listeners.append(Listener(engine, job))
        submitted.set()
        other = Listener(engine, generate_job((1,), max_tokens=3))
        assert other.failure() is None
        assert listeners[0].events == told
        assert engine.num_free_blocks == engine.num_blocks


def test_what_a_pass_gave_is_told_before_the_next() -> None:
    model = FakeModel()
    told: list[int] = []
    with running_engine(model) as engine:
        listeners: list[Listener] = []
        submitted = threading.Event()

        def count(num_forwards: int) -> None:
            submitted.wait()
            told.append(sum(isinstance(event, CompletionDecoded) for event in listeners[0].events))

        model.before_forward = count
        listeners.append(Listener(engine, generate_job(PROMPT, max_tokens=5)))
        submitted.set()
        listeners[0].wait()
    assert told == [0, 1, 2, 3, 4]


def test_the_end_of_a_job_is_told_though_the_last_one_beside_it_is_cancelled() -> None:
    model = FakeModel()
    with running_engine(model) as engine:
        listeners: list[Listener] = []
        submitted = threading.Event()

        def cancel(num_forwards: int) -> None:
            submitted.wait()
            if sum(isinstance(event, CompletionDecoded) for event in listeners[0].events) == 2:  # its last pass
                engine.cancel(listeners[1].ticket)

        model.before_forward = cancel
        listeners.append(Listener(engine, generate_job(PROMPT, max_tokens=3)))
        listeners.append(Listener(engine, generate_job(PROMPT, max_tokens=200)))
        submitted.set()
        assert listeners[0].failure() is None


def test_a_job_cancelled_while_it_waits_never_starts() -> None:
    with running_engine(FakeModel(), max_sequences=1) as engine:
        first = Listener(engine, generate_job(PROMPT, max_tokens=100))
        waiting = Listener(engine, generate_job(PROMPT))
        engine.cancel(waiting.ticket)
        assert first.failure() is None
    assert waiting.events == []


def test_a_job_that_has_ended_can_be_cancelled_without_harm() -> None:
    with running_engine(FakeModel()) as engine:
        first = Listener(engine, generate_job(PROMPT))
        first.wait()
        engine.cancel(first.ticket)
        assert Listener(engine, generate_job(PROMPT)).token_ids() == first.token_ids()


def test_a_step_that_fails_fails_the_jobs_under_way_and_the_next_ones_go_on() -> None:
    model = FakeModel()

    def break_down(num_forwards: int) -> None:
        if num_forwards == 3:
            raise RuntimeError("out of memory")

    with running_engine(model) as engine:
        model.before_forward = break_down
        assert Listener(engine, generate_job(PROMPT)).failure() == "ENGINE_FAILED"
        assert engine.num_free_blocks == engine.num_blocks
        assert Listener(engine, generate_job(PROMPT)).failure() is None


def test_a_listener_that_raises_disturbs_nobody() -> None:
    def refuse(events: object) -> None:
        raise RuntimeError("gone")

    with running_engine(FakeModel()) as engine:
        engine.submit(generate_job(PROMPT), refuse)
        assert Listener(engine, generate_job(PROMPT)).failure() is None


def test_a_full_queue_refuses_with_a_hint_to_wait() -> None:
    model, entered, release = FakeModel(), threading.Event(), threading.Event()

    def hold(num_forwards: int) -> None:
        entered.set()
        release.wait()

    model.before_forward = hold
    with running_engine(model, max_sequences=1, max_queue=2) as engine:
        jobs = [Listener(engine, generate_job(PROMPT))]
        entered.wait()
        jobs += [Listener(engine, generate_job(PROMPT)) for _ in range(2)]
        with pytest.raises(EngineUnavailableError) as refusal:
            Listener(engine, generate_job(PROMPT))
        release.set()
        assert (refusal.value.reason, refusal.value.retry_after_s) == ("QUEUE_FULL", 1.0)
        assert [job.failure() for job in jobs] == [None] * 3


def test_an_engine_that_closes_fails_what_is_under_way_and_takes_no_more() -> None:
    model = FakeModel(context_length=4096, num_blocks=600)
    entered = threading.Event()
    model.before_forward = lambda num_forwards: entered.set()
    with running_engine(model) as engine:
        job = Listener(engine, generate_job(PROMPT, max_tokens=4000))
        entered.wait()
        engine.close()
        assert job.failure() == "SHUTTING_DOWN"
        with pytest.raises(EngineUnavailableError) as refusal:
            Listener(engine, generate_job(PROMPT))
        assert (refusal.value.reason, refusal.value.retry_after_s) == ("SHUTTING_DOWN", None)


def test_a_job_larger_than_the_cache_is_unfit_and_one_that_fills_it_runs() -> None:
    with running_engine(FakeModel(num_blocks=5)) as engine:
        most = 3 * BLOCK_SIZE - 1  # one block is for the prompt's own sequence
        assert engine.unfit(generate_job((1,), max_tokens=most + 1)) is not None
        job = generate_job((1,), max_tokens=most)
        assert engine.unfit(job) is None
        assert len(Listener(engine, job).token_ids()) == most


# what was computed before

LONG = tuple(byte % 250 for byte in range(3 * BLOCK_SIZE + 5))


def cached(listener: Listener) -> int:
    """How many tokens of its prefix a job did not have to compute."""
    listener.wait()
    (started,) = [event for event in listener.events if isinstance(event, JobStarted)]
    return started.cached_token_count


@pytest.mark.parametrize("length", [BLOCK_SIZE, BLOCK_SIZE + 1, 3 * BLOCK_SIZE, 3 * BLOCK_SIZE + 5])
def test_a_prefix_seen_before_is_not_computed_again_but_for_its_last_tokens(length: int) -> None:
    job = score_job(LONG[:length], PROMPT, next_token=True)
    with running_engine(FakeModel()) as engine:
        first, second = Listener(engine, job), Listener(engine, job)
        assert cached(first) == 0
        assert cached(second) == (length - 1) // BLOCK_SIZE * BLOCK_SIZE
        assert second.scored(0) == first.scored(0) == alone(job).scored(0)


def test_a_conversation_goes_on_where_it_was_left() -> None:
    with running_engine(FakeModel()) as engine:
        first = Listener(engine, generate_job(LONG, max_tokens=60))
        drawn = [token.position.token_id for token in first.tokens(0)]
        longer = (*LONG, *(token_id for token_id in drawn if token_id is not None), *PROMPT)
        job = generate_job(longer, max_tokens=5)
        second = Listener(engine, job)
        # the last token drawn was never computed
        assert cached(second) == (len(LONG) + 59) // BLOCK_SIZE * BLOCK_SIZE
        assert second.tokens(0) == alone(job).tokens(0)


def test_what_has_to_make_room_is_computed_again() -> None:
    jobs = [score_job([letter] * 2 * BLOCK_SIZE, PROMPT) for letter in range(8)]
    with running_engine(FakeModel(num_blocks=12)) as engine:
        for job in [*jobs, *jobs]:
            assert Listener(engine, job).scored(0) == alone(job).scored(0)
        assert engine.num_free_blocks == engine.num_blocks


def test_a_prompt_that_is_told_is_computed_whole() -> None:
    job = replace(generate_job(LONG, max_tokens=1), prompt_logprobs=LogprobOptions(top_count=1))
    with running_engine(FakeModel()) as engine:
        first, second = Listener(engine, job), Listener(engine, job)
        assert (cached(first), cached(second)) == (0, 0)
        told = [[p for e in one.events if isinstance(e, PromptScored) for p in e.positions] for one in (first, second)]
        assert told[0] == told[1]
        assert len(told[0]) == len(LONG) - 1


def test_what_a_step_gave_is_handed_over_at_once() -> None:
    steps: list[int] = []
    all_submitted = threading.Event()

    def note(told: Told) -> None:
        steps.append(len(told))
        tell_each(told)

    def logits(history: tuple[int, ...]) -> Tensor:
        assert all_submitted.wait(60)
        return random_logits(history)

    with running_engine(FakeModel(logits), hand_over=note) as engine:
        listeners = [Listener(engine, generate_job(prompt)) for prompt in OTHERS]
        all_submitted.set()
        for listener in listeners:
            listener.wait()
    assert max(steps) == len(OTHERS)
    assert 0 not in steps


def test_a_listener_that_raises_keeps_nothing_from_the_others() -> None:
    def broken(events: Sequence[Event]) -> None:
        raise ZeroDivisionError

    with running_engine(FakeModel()) as engine:
        engine.submit(generate_job(PROMPT), broken)
        assert len(Listener(engine, generate_job(PROMPT, max_tokens=20)).token_ids()) == 20
