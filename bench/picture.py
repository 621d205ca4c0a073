"""The picture of a run: for each figure that rivals share, everyone's median as a bar, and the machine's ceiling."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import median

from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas

from bench.figures import OURS, Results, Standing
from bench.machine import Machine

__all__ = ["draw"]

_COLUMNS = 2
_CELL_INCHES = (5.0, 1.9)
_OURS, _THEIRS = "#1f6feb", "#b0b8c4"


def draw(found: Sequence[Standing], results: Results, machine: Machine, path: Path) -> None:
    """Writes the picture; the path's ending says in which format."""
    shown = [stands for stands in found if stands.figure.against_rivals]
    rows = -(-len(shown) // _COLUMNS)
    canvas = Canvas(figsize=(_CELL_INCHES[0] * _COLUMNS, _CELL_INCHES[1] * rows), layout="constrained")
    cells = canvas.subplots(rows, _COLUMNS, squeeze=False).flat
    for stands, axes in zip(shown, cells, strict=False):
        _bars(axes, stands, results, machine)
    for axes in list(cells)[len(shown) :]:
        axes.set_axis_off()
    canvas.suptitle(f"{machine.dtype}, {machine.threads} cores of {machine.processor}", fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    canvas.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def _bars(axes: Axes, stands: Standing, results: Results, machine: Machine) -> None:
    figure = stands.figure
    values = {name: runs for name, measured in results.items() if (runs := figure.value(measured, machine))}
    names = sorted(values, key=lambda name: (name == OURS, name))
    bars = axes.barh(
        names, [median(values[name]) for name in names], color=[_OURS if name == OURS else _THEIRS for name in names]
    )
    axes.bar_label(bars, fmt="{:,.3g}" if figure.less else "{:,.0f}", padding=3, fontsize="x-small")
    if figure.ceiling:
        axes.axvline(figure.ceiling(machine), color="black", linewidth=0.8, linestyle=":")
    axes.set_title(f"{figure.name}: {figure.unit}{', less is better' * figure.less}", fontsize="small", loc="left")
    axes.tick_params(labelsize="x-small")
    axes.margins(x=0.12)
    axes.spines[["top", "right"]].set_visible(False)
