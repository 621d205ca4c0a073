"""The figures that the project is judged by, beside rivals and the machine's ceilings; no I/O."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import repeat
from statistics import median
from typing import TypeAlias

from bench.machine import Machine
from bench.workload import QUESTIONS, Question

__all__ = ["FIGURES", "OURS", "START", "Figure", "Measured", "Results", "Standing", "ideal_s", "standing"]

OURS = "ours"
START = "start"
"""The question that every start of a subject answers."""

Measured: TypeAlias = Mapping[str, Sequence[Mapping[str, float]]]
"""What one subject was measured to do: by question, of every run."""
Results: TypeAlias = Mapping[str, Measured]
"""What all did, by subject."""
_Value: TypeAlias = Callable[[Measured, Machine], list[float]]
_Ceiling: TypeAlias = Callable[[Machine], float]

_DTYPES = ("bfloat16", "float32")
_QUESTIONS = {question.key: question for question in QUESTIONS}


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """One figure: a list of values, one a run.

    ceiling: the best that the machine allows, in the same unit.
    less: whether less is better.
    goals: by type of the model: what the figure is to be, times the best rival's if `against_rivals`.
    ceiling_goal: what share of the ceiling it is to be.
    """

    name: str
    unit: str
    value: _Value
    ceiling: _Ceiling | None = None
    less: bool = False
    against_rivals: bool = True
    goals: Mapping[str, float]
    ceiling_goal: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """How a figure came out. `ratio`: to the best rival; `share`: of the ceiling as it was in the same run; None where
    there is none."""

    figure: Figure
    ours: Sequence[float]
    rival: str | None
    rivals: Sequence[float]
    ratio: float | None
    share: float | None
    goal: float | None
    met: bool | None


def standing(figure: Figure, results: Results, machine: Machine) -> Standing | None:
    """Our medians beside the best rival's; None if the questions were not asked."""
    values = {name: figure.value(measured, machine) for name, measured in results.items()}
    ours = values.pop(OURS, [])
    if not ours:
        return None
    others = {name: median(theirs) for name, theirs in values.items() if theirs}
    best = (min if figure.less else max)(others, key=lambda name: others[name]) if others else None
    ratio = median(ours) / others[best] if best else None
    share = None
    if figure.ceiling:
        runs = zip(ours, _machines(results[OURS], machine), strict=False)
        shares = (value / figure.ceiling(then) for value, then in runs)
        share = median(1 / each if figure.less else each for each in shares)
    goal = figure.goals.get(machine.dtype)
    return Standing(
        figure=figure,
        ours=ours,
        rival=best,
        rivals=values[best] if best else (),
        ratio=ratio,
        share=share,
        goal=goal,
        met=_met(figure, ratio if figure.against_rivals else median(ours), goal, share),
    )


def _met(figure: Figure, reached: float | None, goal: float | None, share: float | None) -> bool | None:
    if goal is None or reached is None:
        return None
    enough = reached <= goal if figure.less else reached >= goal
    return enough and (figure.ceiling_goal is None or share is None or share >= figure.ceiling_goal)


def _measure(key: str, name: str) -> _Value:
    return lambda measured, machine: [run[name] for run in measured.get(key, ()) if name in run]


def _machines(measured: Measured, machine: Machine) -> Iterable[Machine]:
    """The machine as it was in each run (a shared one may be half as fast a minute later), at its best in all where
    nobody looked."""
    starts = (start for start in measured.get(START, ()) if start.keys() >= machine.ceilings.keys())
    return [machine.at(start) for start in starts] or repeat(machine)


def _ratio(above: _Value, below: _Value) -> _Value:
    return lambda measured, machine: [
        a / b for a, b in zip(above(measured, machine), below(measured, machine), strict=False)
    ]


def ideal_s(question: Question, machine: Machine) -> float:
    """Seconds that a question takes at least: prompts at the rate of products, then step after step."""
    scored = question.tokens if not question.new_tokens else 0
    computed = question.clients * question.requests * (question.prompt_tokens + question.choices**2)
    streams = question.clients * question.completions
    step_s = machine.step_s(streams, question.prompt_tokens + question.new_tokens / 2)
    return computed * machine.layers_s + scored * machine.head_s + question.requests * question.new_tokens * step_s


def _rate(key: str, goals: Mapping[str, float], ceiling_goal: float | None = None) -> Figure:
    """Tokens per second, prompts included, of a question that everyone is asked."""
    question = _QUESTIONS[key]
    return Figure(
        name=question.name,
        unit="tokens/s",
        value=_measure(key, "tokens_s"),
        ceiling=lambda machine: question.tokens / ideal_s(question, machine),
        goals=goals,
        ceiling_goal=ceiling_goal,
    )


def _wall(key: str, goals: Mapping[str, float]) -> Figure:
    """Seconds of a question that everyone is asked."""
    question = _QUESTIONS[key]
    return Figure(
        name=question.name,
        unit="s",
        value=_measure(key, "seconds"),
        ceiling=lambda machine: ideal_s(question, machine),
        less=True,
        goals=goals,
    )


def _own(
    name: str, value: _Value, goal: float | None, *, unit: str = "", less: bool = False, dtypes: Sequence[str] = _DTYPES
) -> Figure:
    """A figure that stands for itself, whatever rivals do."""
    goals = {} if goal is None else dict.fromkeys(dtypes, goal)
    return Figure(name=name, unit=unit, value=value, less=less, against_rivals=False, goals=goals)


def _alternatives(count: int, goal: float | None) -> Figure:
    value = _ratio(_measure(f"top{count}", "tokens_s"), _measure("top0", "tokens_s"))
    return _own(f"rate with {count} alternatives / with none, 16 streams", value, goal)


def _growth(measured: Measured, machine: Machine) -> list[float]:
    """How much longer a step gets with a longer context, over the time of reading what the cache holds more."""
    short, long = _QUESTIONS["context128"], _QUESTIONS["context2048"]
    more = (long.prompt_tokens - short.prompt_tokens) * long.clients * machine.kv_bytes
    steps = [_measure(question.key, "steady_p50_ms")(measured, machine) for question in (short, long)]
    runs = zip(*steps, _machines(measured, machine), strict=False)
    return [(longer - shorter) / (1e3 * more / then.read_bytes_per_s) for shorter, longer, then in runs]


def _decode_ceiling(machine: Machine) -> float:
    question = _QUESTIONS["decode1"]
    return 1 / machine.step_s(1, question.prompt_tokens + question.new_tokens / 2)


_STEADY = _measure("late", "steady_p50_ms")

FIGURES = (
    Figure(
        name="1 stream, decoding only",
        unit="tokens/s",
        value=_measure("decode1", "decode_tokens_s"),
        ceiling=_decode_ceiling,
        goals={"bfloat16": 1.0, "float32": 0.9},
        ceiling_goal=0.85,
    ),
    _rate("decode4", {"bfloat16": 1.2}),
    _rate("decode16", {"bfloat16": 1.2, "float32": 1.1}),
    _rate("decode32", {"bfloat16": 1.2, "float32": 1.1}),
    _rate("score", {"bfloat16": 1.3, "float32": 1.1}, 0.9),
    _rate("score2000", {"bfloat16": 1.25, "float32": 1.1}),
    _wall("rank", {"bfloat16": 0.7}),
    _wall("choice", {"bfloat16": 0.15}),
    _own("inter-token p99 / p50, 16 streams", _ratio(_measure("late", "steady_p99_ms"), _STEADY), 1.3, less=True),
    _own(
        "p99 while a prompt of 2,000 tokens comes in / p50 before",
        _ratio(_measure("late", "late_p99_ms"), _STEADY),
        3.0,
        less=True,
    ),
    _own(
        "rate over gRPC / of the engine alone, 32 streams",
        _ratio(_measure("service", "tokens_s"), _measure("engine", "tokens_s")),
        0.95,
    ),
    *(_alternatives(count, goal) for count, goal in ((1, None), (5, 0.97), (20, 0.93), (100, None))),
    _own("growth of a step to 2,048 tokens / reading the cache, 16 streams", _growth, 1.5, less=True),
    _own(
        "memory over idle, scoring 2,000 tokens of 250,880", _measure("wide", "grown_mib"), 200.0, unit="MiB", less=True
    ),
    _own("memory when idle", _measure(START, "mib"), 1144.0, unit="MiB", less=True, dtypes=["bfloat16"]),
    _own("ready after start", _measure(START, "seconds"), 8.0, unit="s", less=True),
)
