"""What the benchmark counts: prompts of exact lengths, never twice; every token; which gaps mean what; the goals."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from dataclasses import asdict, replace

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from bench.exchange import LATE_AFTER, LATE_NEW_TOKENS, Answer, Stream, Task, Told
from bench.figures import FIGURES, OURS, START, Figure, Results, Standing, ideal_s, standing
from bench.machine import Machine
from bench.subjects.subject import Note, Streaming
from bench.summary import measures, percentile
from bench.workload import QUESTIONS, Question, make_task, warm_up

MACHINE = Machine(
    processor="a processor",
    threads=2,
    torch="0",
    dtype="bfloat16",
    read_bytes_per_s=1e9,
    layers_s=1e-3,
    head_s=1e-4,
    weight_bytes=100_000_000,
    kv_bytes=1_000,
)
KEYS = [question.key for question in QUESTIONS]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """One token per byte."""
    alphabet = {character: index for index, character in enumerate(pre_tokenizers.ByteLevel.alphabet())}
    tokenizer = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return tokenizer


@pytest.mark.parametrize("question", QUESTIONS, ids=KEYS)
def test_tasks_hold_what_the_question_says(question: Question, tokenizer: Tokenizer) -> None:
    task = make_task(question, tokenizer, 0)
    assert [len(prompts) for prompts in task.prompts] == [question.requests] * question.clients
    assert {len(prompt) for prompts in task.prompts for prompt in prompts} == {question.prompt_tokens}
    assert [len(choice) for choice in task.choices] == [question.choices] * question.choices
    assert len(task.late) == question.late_tokens
    assert Task(**json.loads(json.dumps(asdict(task)))) == task


@pytest.mark.parametrize("question", QUESTIONS, ids=KEYS)
def test_no_prompt_is_asked_twice(question: Question, tokenizer: Tokenizer) -> None:
    tasks = [
        make_task(each, tokenizer, seed) for each, seed in ((question, 0), (question, 1), (warm_up(question), "w"))
    ]
    prompts = [tuple(prompt) for task in tasks for prompts in task.prompts for prompt in prompts]
    assert len(set(prompts)) == len(prompts)


def test_questions_have_keys_of_their_own() -> None:
    assert len(set(KEYS)) == len(KEYS)
    assert START not in KEYS


@pytest.mark.parametrize(
    ("key", "tokens"),
    {
        "decode1": 256,
        "decode4": 768,
        "decode16": 2048,
        "decode32": 2048,
        "score": 4096,
        "score2000": 2000,
        "rank": 960,
        "choice": 64,
    }.items(),
)
def test_rates_are_about_every_token_asked_for(key: str, tokens: int) -> None:
    assert QUESTIONS[KEYS.index(key)].tokens == tokens


@pytest.mark.parametrize(
    ("values", "share", "expected"), [([5], 0.99, 5), ([3, 1, 2], 0.5, 2), ([2, 1], 0.5, 1), (range(1, 101), 0.99, 99)]
)
def test_percentile_is_the_least_value_that_the_share_do_not_exceed(
    values: Sequence[float], share: float, expected: float
) -> None:
    assert percentile(values, share) == expected


def test_gaps_are_told_apart_by_what_goes_on() -> None:
    early = Stream(start=0.0, times=[1.0, 2.0, 3.0, 6.0, 7.0], counts=[1] * 5)
    later = Stream(start=0.5, times=[1.5, 2.5, 3.5, 7.5, 9.5], counts=[1] * 5)
    late = Stream(start=4.0, times=[6.5, 6.6], counts=[1, 1])
    found = measures(Answer(seconds=10.0, streams=[early, later], told=[], late=late), tokens=10, completions=1)
    assert found["tokens_s"] == 1.0
    assert found["ttft_p50_ms"] == 1000.0
    assert found["decode_tokens_s"] == pytest.approx((4 / 6 + 4 / 8) / 2)
    assert found["itl_p99_ms"] == 4000.0
    assert found["steady_p99_ms"] == 1000.0
    assert found["late_p50_ms"] == 3000.0  # what the late prompt's time touches: 3, 1 and 4 s
    assert found["late_p99_ms"] == 4000.0


def test_steady_gaps_end_with_the_first_stream() -> None:
    short = Stream(start=0.0, times=[1.0, 2.0, 3.0], counts=[1] * 3)
    long = Stream(start=0.0, times=[1.0, 2.0, 3.0, 9.0], counts=[1] * 4)
    assert measures(Answer(seconds=9.0, streams=[short, long], told=[]), 7, 1)["steady_p99_ms"] == 1000.0


def test_streams_of_several_completions_tell_no_gaps() -> None:
    stream = Stream(start=0.0, times=[1.0, 2.0], counts=[3, 3])
    assert set(measures(Answer(seconds=2.0, streams=[stream], told=[]), 6, 3)) == {"seconds", "tokens_s", "ttft_p50_ms"}


def test_answers_survive_their_line() -> None:
    stream = Stream(start=0.5, times=[1.0], counts=[2])
    for answer in (
        Answer(seconds=1.0, streams=[stream], told=[[(5, -0.5), (6, -1.5)]], late=stream),
        Answer(seconds=1.0, streams=[], told=[]),
    ):
        assert Answer.from_json(json.loads(json.dumps(asdict(answer)))) == answer


class Counting(Streaming):
    """Tells a prompt's number with every token, one a turn of the loop; scores all tokens that something precedes."""

    def __init__(self, lost: int = 0) -> None:
        self.lost = lost
        self.told: list[int] = []

    async def generate(self, prompt: Sequence[int], task: Task, note: Note) -> None:
        for _ in range(task.new_tokens - self.lost):
            await asyncio.sleep(0)
            self.told.append(prompt[0])
            note(prompt)

    def tokens(self, message: Sequence[int], top: int) -> Told:
        return [(message[0], -1.0)]

    async def score(self, prompt: Sequence[int], task: Task) -> list[float]:
        return [-1.0] * (len(prompt) - 1 - self.lost)


def task_of(*prompts: list[list[int]], new_tokens: int, late: list[int] | None = None) -> Task:
    """A task of these clients."""
    return Task(
        prompts=list(prompts),
        new_tokens=new_tokens,
        completions=1,
        temperature=0.0,
        choices=[],
        top=0,
        late=late or [],
    )


async def test_a_client_asks_one_after_the_other_and_clients_ask_at_once() -> None:
    subject = Counting()
    answer = await subject.answer(task_of([[1], [2]], [[3], [4]], new_tokens=3))
    assert subject.told == [1, 3] * 3 + [2, 4] * 3
    assert [sum(stream.counts) for stream in answer.streams] == [3] * 4
    assert answer.late is None


async def test_the_late_prompt_comes_in_when_all_others_are_under_way() -> None:
    subject = Counting()
    answer = await subject.answer(task_of([[1]], [[2]], new_tokens=2 * LATE_AFTER, late=[3]))
    before = subject.told[: subject.told.index(3)]
    assert min(before.count(1), before.count(2)) >= LATE_AFTER
    assert answer.late is not None
    assert sum(answer.late.counts) == LATE_NEW_TOKENS
    assert subject.told.count(1) == 2 * LATE_AFTER


@pytest.mark.parametrize("new_tokens", [5, 0])
async def test_who_tells_too_few_tokens_is_not_measured(new_tokens: int) -> None:
    with pytest.raises((AssertionError, ExceptionGroup), check=lambda error: "not" in repr(error)):
        await Counting(lost=1).answer(task_of([[1, 2, 3]], new_tokens=new_tokens))


def test_the_best_of_two_measurements_is_the_ceiling() -> None:
    slower = replace(MACHINE, read_bytes_per_s=5e8, head_s=5e-5)
    assert MACHINE.best(slower) == slower.best(MACHINE) == replace(MACHINE, head_s=5e-5)


def test_ideal_time_reads_the_weights_once_a_step() -> None:
    question = QUESTIONS[KEYS.index("decode1")]
    step_s = (100_000_000 + (80 + 32) * 1_000) / 1e9
    assert ideal_s(question, MACHINE) == pytest.approx(4 * (80 * 1e-3 + 64 * step_s))


def test_ideal_time_of_a_step_is_that_of_its_products_where_they_take_longer() -> None:
    assert MACHINE.step_s(1000, 1.0) == pytest.approx(1000 * 1.1e-3)


def test_scored_tokens_take_the_head_too() -> None:
    question = QUESTIONS[KEYS.index("score")]
    assert ideal_s(question, MACHINE) == pytest.approx(4096 * 1.1e-3)


def figure(name: str) -> Figure:
    """The figure of that name."""
    return next(each for each in FIGURES if each.name == name)


def stands(figure: Figure, results: Results, machine: Machine = MACHINE) -> Standing:
    """How a figure came out that was measured."""
    found = standing(figure, results, machine)
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("ours", "rivals", "best", "met"),
    [(121.0, {"a": 100.0, "b": 90.0}, "a", True), (119.0, {"a": 100.0}, "a", False), (500.0, {}, None, None)],
)
def test_rates_are_compared_with_the_best_rival(
    ours: float, rivals: dict[str, float], best: str | None, met: bool | None
) -> None:
    results = {name: {"decode4": [{"tokens_s": rate}]} for name, rate in {OURS: ours, **rivals}.items()}
    found = stands(figure("4 streams"), results)
    assert (found.rival, found.met) == (best, met)


def test_walls_are_compared_with_the_quickest_rival() -> None:
    results = {name: {"rank": [{"seconds": s}]} for name, s in {OURS: 1.0, "a": 3.0, "b": 2.0}.items()}
    found = stands(figure("sample and rank, 20 x 48 tokens"), results)
    assert (found.rival, found.ratio, found.met) == ("b", 0.5, True)
    assert found.share == pytest.approx(ideal_s(QUESTIONS[KEYS.index("rank")], MACHINE))


@pytest.mark.parametrize(
    ("name", "key", "measure"),
    [("1 stream, decoding only", "decode1", "decode_tokens_s"), ("score 16 x 256 tokens", "score", "tokens_s")],
)
def test_each_run_is_held_against_the_machine_as_it_was_then(name: str, key: str, measure: str) -> None:
    machines = [
        replace(
            MACHINE,
            read_bytes_per_s=MACHINE.read_bytes_per_s * speed,
            layers_s=MACHINE.layers_s / speed,
            head_s=MACHINE.head_s / speed,
        )
        for speed in (1.0, 0.5, 2.0)
    ]
    ceiling = figure(name).ceiling
    assert ceiling is not None
    measured = {
        START: [{"seconds": 5.0, "mib": 700.0, **machine.ceilings} for machine in machines],
        key: [{measure: 0.8 * ceiling(machine)} for machine in machines],
    }
    assert stands(figure(name), {OURS: measured}).share == pytest.approx(0.8)


@pytest.mark.parametrize(("step_ms", "met"), [(1.0, True), (100.0, False)])
def test_growth_is_measured_in_the_time_of_reading_the_cache(step_ms: float, met: bool) -> None:
    measured = {"context128": [{"steady_p50_ms": 5.0}], "context2048": [{"steady_p50_ms": 5.0 + step_ms}]}
    found = stands(figure("growth of a step to 2,048 tokens / reading the cache, 16 streams"), {OURS: measured})
    assert list(found.ours) == pytest.approx([step_ms / (1920 * 16 * 1_000 / 1e9 * 1e3)])
    assert found.met is met


def test_figures_of_questions_not_asked_are_left_out() -> None:
    assert [each for each in FIGURES if standing(each, {OURS: {}}, MACHINE)] == []


def test_goals_are_those_of_the_type() -> None:
    results = {OURS: {"decode16": [{"tokens_s": 115.0}]}, "a": {"decode16": [{"tokens_s": 100.0}]}}
    for dtype, met in {"bfloat16": False, "float32": True}.items():
        assert stands(figure("16 streams"), results, replace(MACHINE, dtype=dtype)).met is met
