"""What came out: for people two tables and a picture, for machines one JSON line."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median

from rich.console import Console
from rich.table import Table

from bench.figures import FIGURES, OURS, START, Results, Standing, standing
from bench.machine import Machine
from bench.peers import RIVALS
from bench.workload import QUESTIONS

__all__ = ["report"]

_WIDTH = 150
_COLUMNS = {
    "tokens_s": "tokens/s",
    "decode_tokens_s": "a stream's",
    "ttft_p50_ms": "first token ms",
    "itl_p50_ms": "p50 ms",
    "itl_p99_ms": "p99 ms",
    "seconds": "s",
    "mib": "MiB",
    "foreign_cores": "other work, cores",
}


def report(results: Results, machine: Machine, picture: Path | None) -> None:
    """Prints both tables and the line, and draws the picture if there is a place for it."""
    found = [stands for figure in FIGURES if (stands := standing(figure, results, machine))]
    console = Console(width=_WIDTH)
    console.print(_measured_table(results), _figures_table(found))
    figures = {stands.figure.name: _as_json(stands) for stands in found}
    rivals = {name: RIVALS[name].requirements for name in results if name in RIVALS}
    print(json.dumps({"machine": asdict(machine), "rivals": rivals, "figures": figures, "results": results}))
    if picture:
        from bench.picture import draw  # matplotlib is there for this alone

        draw(found, results, machine, picture)


def _measured_table(results: Results) -> Table:
    table = Table("question", "", *_COLUMNS.values(), box=None, title="Medians")
    lacks = [f"{name}: {RIVALS[name].less}" for name in results if name in RIVALS and RIVALS[name].less]
    table.caption = " · ".join(lacks)
    for key, question in [(START, "ready, then idle"), *((q.key, q.name) for q in QUESTIONS)]:
        for name, measured in results.items():
            if runs := measured.get(key):
                cells = [_number(median(r[c] for r in runs)) if c in runs[0] else "" for c in _COLUMNS]
                table.add_row(question, name, *cells, style="bold" if name == OURS else None)
    return table


def _figures_table(found: Sequence[Standing]) -> Table:
    headings = ("figure", "ours", "spread", "", "best rival", "", "ratio", "goal", "of the ceiling", "goal", "")
    table = Table(*headings, box=None)
    for stands in found:
        figure = stands.figure
        sign = "≤" if figure.less else "≥"
        table.add_row(
            figure.name,
            _number(median(stands.ours)),
            f"{_number(min(stands.ours))} to {_number(max(stands.ours))}",
            figure.unit,
            _number(median(stands.rivals)) if stands.rival else "",
            stands.rival,
            "" if stands.ratio is None else f"{stands.ratio:.2f}",
            "" if stands.goal is None else f"{sign} {stands.goal:g}{' x' * figure.against_rivals}",
            "" if stands.share is None else f"{stands.share:.2f}",
            "" if figure.ceiling_goal is None else f"≥ {figure.ceiling_goal:g}",
            {True: "[green]✓[/]", False: "[red]✗[/]", None: ""}[stands.met],
        )
    return table


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _as_json(stands: Standing) -> dict[str, object]:
    figure = stands.figure
    return {
        "unit": figure.unit,
        "ours": median(stands.ours),
        "rival": stands.rival,
        "best": median(stands.rivals) if stands.rival else None,
        "ratio": stands.ratio,
        "of_ceiling": stands.share,
        "goal": stands.goal,
        "met": stands.met,
    }
