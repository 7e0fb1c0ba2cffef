"""A plan in one picture: a bar per optimizer, stacked from what it is made of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from adafactor.cli.plan.report import size
from adafactor.planning import Plan

# Okabe and Ito's colours: told apart by colour-blind eyes and in grey.
COLOURS = {"weights": "#999999", "gradients": "#56B4E9", "state": "#D55E00", "temporaries": "#F0E442"}
INK, FAINT = "#222222", "#BBBBBB"


def draw(name: str, plan: Plan, card: int | None, file: Path) -> None:
    """Draw to ``file``, in the format its suffix names; no display is needed."""
    style: dict[Any, Any] = {
        "font.size": 10, "text.color": INK, "axes.edgecolor": FAINT, "axes.labelcolor": INK, "xtick.color": INK,
        "ytick.color": INK, "axes.spines.top": False, "axes.spines.right": False, "axes.spines.left": False,
    }  # fmt: skip
    usages = plan.usages[::-1]
    labels = [usage.optimizer.label for usage in usages]
    totals = [usage.total for usage in usages]
    scale, unit = next(
        ((10**power, unit) for power, unit in ((9, "GB"), (6, "MB"), (3, "kB")) if max(totals, default=0) >= 10**power),
        (1, "bytes"),
    )
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(10, 1.6 + 0.42 * len(usages)), dpi=130, layout="constrained")
        axes = figure.subplots()
        left = [0.0] * len(usages)
        for part, colour in COLOURS.items():
            widths = [(getattr(usage, part) or 0) / scale for usage in usages]
            axes.barh(labels, widths, left=left, color=colour, label=part, height=0.66)
            left = [a + b for a, b in zip(left, widths, strict=True)]
        for position, total in enumerate(totals):
            axes.annotate(
                size(total), (left[position], position), (5, 0), textcoords="offset points", va="center", weight="bold"
            )
        widest = max(left, default=0.0)
        if card is not None:
            axes.axvline(card / scale, color=INK, linewidth=1.2, linestyle=(0, (4, 3)))
            axes.annotate(
                f"{size(card)} card", (card / scale, len(usages) - 0.5), (4, 2), textcoords="offset points", size=9
            )
            widest = max(widest, card / scale)
        axes.set_xlim(0, 1.13 * widest or 1)
        axes.set_ylim(-0.6, len(usages) - 0.1)
        axes.tick_params(axis="y", length=0)
        kind = f"ZeRO {plan.zero}" if plan.zero else "FSDP2"
        shared = "" if plan.shards == 1 else f", each of {plan.shards} {kind} ranks"
        axes.set_title(f"{name}: {plan.size:,} parameters{shared}", loc="left", weight="bold", size=11)
        axes.set_xlabel(f"{unit}, activations not included")
        axes.legend(frameon=False, ncols=4, loc="upper center", bbox_to_anchor=(0.4, -0.11 - 0.3 / len(usages)))
        figure.savefig(file)
