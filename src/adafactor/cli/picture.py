"""Bars as a picture: of a plan, stacked from what it is made of; of step times, a panel per case. No display needed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, NullFormatter

from adafactor.cli.bench.timing import Case
from adafactor.cli.plan.report import size, title
from adafactor.planning import Plan

# Okabe and Ito's colours: told apart by colour-blind eyes and in grey.
PARTS = {"weights": "#999999", "gradients": "#56B4E9", "state": "#D55E00", "temporaries": "#F0E442"}
OURS, OURS_TOO, FLOOR, PEER = "#1f77b4", "#7fb2d9", "#bbbbbb", "#e08a3c"
COLUMNS = 2


@contextmanager
def _figure(file: Path, width: float, height: float) -> Iterator[Figure]:
    with matplotlib.rc_context({"axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(width, height), dpi=120, layout="constrained")
        yield figure
        figure.savefig(file)


def draw_plan(name: str, plan: Plan, card: int | None, file: Path) -> None:
    """A bar per optimizer, and a line where the card ends."""
    usages = plan.usages[::-1]
    labels = [usage.optimizer.label for usage in usages]
    with _figure(file, 10, 1.6 + 0.42 * len(usages)) as figure:
        axes = figure.subplots()
        left = np.zeros(len(usages))
        for part, colour in PARTS.items():
            widths = np.array([float(getattr(usage, part) or 0) for usage in usages])
            bars = axes.barh(labels, widths, left=left, color=colour, label=part)
            left += widths
        axes.bar_label(bars, [size(usage.total) for usage in usages], padding=5, weight="bold")
        if card is not None:
            axes.axvline(card, color="black", linestyle="--", label=f"{size(card)} card")
        axes.set_xlim(0, 1.13 * max([*left, card or 0]) or 1)
        axes.xaxis.set_major_formatter(EngFormatter("B"))
        axes.set_title(title(name, plan), loc="left", size=10)
        axes.set_xlabel("activations not included")
        figure.legend(frameon=False, ncols=len(PARTS) + 1, loc="outside lower center")


def draw_times(cases: list[Case], title: str, file: Path) -> None:
    """A bar per optimizer, in nanoseconds per parameter."""
    lines = -(-len(cases) // COLUMNS)
    with _figure(file, 12, 0.6 + 2.4 * lines) as figure:
        axes = figure.subplots(lines, COLUMNS, squeeze=False)
        for number, panel in enumerate(axes.flat):
            if number >= len(cases):
                panel.set_visible(False)
                continue
            _panel(panel, cases[number])
            if number + COLUMNS >= len(cases):
                panel.set_xlabel("ns per parameter and step, logarithmic", fontsize=9)
        figure.suptitle(title, fontsize=12)


def _panel(panel: Any, case: Case) -> None:
    values = {row["name"]: row["ns_per_parameter"] for row in reversed(case.rows)}
    colours = [
        (OURS_TOO if "(" in name else OURS) if name.startswith("adafactor.") else FLOOR if "floor" in name else PEER
        for name in values
    ]
    bars = panel.barh(list(values), list(values.values()), color=colours)
    panel.bar_label(bars, fmt="%.2f", padding=3, fontsize=8)
    panel.set_xscale("log")
    panel.set_xlim(min(values.values()) / 2, max(values.values()) * 2.5)
    panel.xaxis.set_minor_formatter(NullFormatter())
    # Two lines where one would not fit over half of the picture.
    head, *rest = case.title.split(", ", 2) if len(case.title) > 45 else (case.title,)
    panel.set_title(",\n".join([", ".join([head, *rest[:-1]]), *rest[-1:]]), fontsize=9, loc="left")
    panel.tick_params(labelsize=8)
