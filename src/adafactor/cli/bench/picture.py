"""Step times as a picture: a panel per case, a bar per optimizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from adafactor.cli.bench.timing import Case

OURS, OURS_TOO, FLOOR, PEER = "#1f77b4", "#7fb2d9", "#bbbbbb", "#e08a3c"
COLUMNS = 2


def colour(name: str) -> str:
    if name.startswith("adafactor."):
        return OURS_TOO if "(" in name else OURS
    return FLOOR if "floor" in name else PEER


def draw(cases: list[Case], title: str, file: Path) -> None:
    """Draw to ``file``, in the format its suffix names; no display is needed."""
    lines = -(-len(cases) // COLUMNS)
    with matplotlib.rc_context({"axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(12, 0.6 + 2.4 * lines), dpi=110, layout="constrained")
        axes = figure.subplots(lines, COLUMNS, squeeze=False)
        for panel, case in zip(axes.flat, cases, strict=False):
            _panel(panel, case)
        for panel in axes.flat[len(cases) :]:
            panel.set_visible(False)
        for column in range(min(COLUMNS, len(cases))):
            lowest = (len(cases) - 1 - column) // COLUMNS
            axes[lowest, column].set_xlabel("ns per parameter and step, logarithmic", fontsize=9)
        figure.suptitle(title, fontsize=12)
        figure.savefig(file)


def _panel(panel: Any, case: Case) -> None:
    rows = case.rows[::-1]
    values = [row["ns_per_parameter"] for row in rows]
    names = [row["name"] for row in rows]
    bars = panel.barh(names, values, color=[colour(name) for name in names])
    panel.bar_label(bars, fmt="%.2f", padding=3, fontsize=8)
    panel.set_xscale("log")
    panel.set_xlim(min(values) / 2, max(values) * 2.5)
    panel.xaxis.set_minor_formatter(NullFormatter())
    # Two lines where one would not fit over half of the picture.
    head, *rest = case.title.split(", ", 2) if len(case.title) > 45 else (case.title,)
    panel.set_title(",\n".join([", ".join([head, *rest[:-1]]), *rest[-1:]]), fontsize=9, loc="left")
    panel.tick_params(labelsize=8)
