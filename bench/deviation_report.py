"""What came out of `bench.fidelity`: two tables for people, one JSON line for machines."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import TypeAlias

import torch
import transformers
from rich.console import Console
from rich.table import Table

from bench.deviation import BF16_MEAN, FLOAT32_RATIO, Deviation, near_enough
from bench.figures import OURS
from bench.machine import processor_name

__all__ = ["Found", "report"]

Found: TypeAlias = Mapping[str, Mapping[str, Deviation]]
"""Deviations in one type, by subject and task."""

_WIDTH = 120
_RIVAL = "transformers"
_GOALS = {"float32": f"mean and max ≤ {FLOAT32_RATIO:g} x", "bfloat16": f"mean ≤ {BF16_MEAN:g} nats"}


def report(found: Mapping[str, Found], threads: int) -> None:
    """Prints how far everyone is off, by type and task, then how ours stand."""
    console = Console(width=_WIDTH)
    console.print(_deviations_table(found), _standings_table(found))
    line = {
        "processor": processor_name(),
        "threads": threads,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "deviations": {
            dtype: {name: {key: asdict(each) for key, each in tasks.items()} for name, tasks in subjects.items()}
            for dtype, subjects in found.items()
        },
    }
    print(json.dumps(line))


def _deviations_table(found: Mapping[str, Found]) -> Table:
    keys = list(next(iter(found.values()))[OURS])
    headings = [f"{key}: {what}" for key in keys for what in ("tokens", "mean", "max")]
    table = Table("type", "", *headings, box=None, title="Nats from float64")
    for dtype, subjects in found.items():
        for name, tasks in subjects.items():
            cells = [cell for key in keys for cell in _cells(tasks.get(key))]
            table.add_row(dtype, name, *cells, style="bold" if name == OURS else None)
    return table


def _cells(found: Deviation | None) -> tuple[str, str, str]:
    return (f"{found.tokens:,}", f"{found.mean:.3g}", f"{found.max:.3g}") if found else ("", "", "")


def _standings_table(found: Mapping[str, Found]) -> Table:
    table = Table("type", "", "ours / transformers': mean", "max", "goal", "", box=None)
    for dtype, subjects in found.items():
        for key, ours in subjects[OURS].items():
            rival = subjects.get(_RIVAL, {}).get(key)
            ratios = [f"{ratio:.2f}" for ratio in ours.over(rival)] if rival else ["", ""]
            sign = {True: "[green]✓[/]", False: "[red]✗[/]", None: ""}[near_enough(dtype, ours, rival)]
            table.add_row(dtype, key, *ratios, _GOALS[dtype], sign)
    return table
