"""The demo in one picture: how fast each optimizer learned, and what it kept in memory for that."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from adafactor.cli.demo.report import Summary
from adafactor.cli.demo.settings import LABELS, Key

# Okabe and Ito's colours: told apart by colour-blind eyes and in grey.
COLOURS: dict[Key, str] = {"adamw": "#999999", "keras-adafactor": "#E69F00", "adafactor": "#0072B2"}
INK, FAINT = "#222222", "#BBBBBB"


def draw(summary: Summary, file: Path) -> None:
    """Draw to ``file``, in the format its suffix names; no display is needed."""
    style: dict[Any, Any] = {
        "font.size": 10,
        "text.color": INK,
        "axes.edgecolor": FAINT,
        "axes.labelcolor": INK,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.titlelocation": "left",
        "axes.titleweight": "bold",
        "axes.titlesize": 11,
        "axes.titlepad": 12,
        "xtick.color": INK,
        "ytick.color": INK,
    }
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(11, 5), dpi=150, layout="constrained")
        losses, bars = figure.subplots(1, 2, width_ratios=(1.45, 1))
        _losses(losses, summary)
        _bars(bars, summary)
        figure.savefig(file)


def _losses(axes: Any, summary: Summary) -> None:
    for run in summary.runs:
        colour = COLOURS[run.key]
        steps = np.arange(1, run.steps + 1)
        # Two Adafactors with the same hyperparameters draw the same curve: dashes on top let both be seen.
        ours = run.key == "adafactor"
        axes.plot(steps, run.losses, color=colour, alpha=0.15, linewidth=0.7)
        axes.plot(
            steps, _recent_mean(run.losses), color=colour, linewidth=1.8 if ours else 3.2,
            linestyle=(0, (4, 2)) if ours else "-",
            label=f"{LABELS[run.key]}, held-out text {run.validation_loss:.3f}",
        )  # fmt: skip
        axes.plot(run.steps, run.validation_loss, "o", color=colour, markersize=5 if ours else 9, clip_on=False)
    axes.set_title("Loss, nats per byte")
    axes.set_xlabel("step")
    axes.grid(axis="y", color=FAINT, alpha=0.4, linewidth=0.6)
    axes.set_xlim(left=0)
    axes.legend(frameon=False, title="lines: mean of recent steps; dots: held-out text", alignment="left")


def _recent_mean(losses: list[float], window: int = 25) -> Any:
    """Mean of the last ``window`` values, of all there are before that many."""
    sums = np.concatenate([[0.0], np.cumsum(losses)])
    last = np.arange(1, len(losses) + 1)
    first = np.maximum(last - window, 0)
    return (sums[last] - sums[first]) / (last - first)


def _bars(axes: Any, summary: Summary) -> None:
    runs = summary.runs
    megabytes = [run.state_bytes / 1e6 for run in runs]
    colours = [COLOURS[run.key] for run in runs]
    # The edge keeps a bar visible that is thinner than a line.
    axes.bar([LABELS[run.key] for run in runs], megabytes, color=colours, edgecolor=colours, width=0.62)
    for position, run in enumerate(runs):
        axes.annotate(
            f"{megabytes[position]:.2f} MB", (position, megabytes[position]), (0, 22), textcoords="offset points",
            ha="center", va="bottom", weight="bold", size=13,
        )  # fmt: skip
        axes.annotate(
            f"{run.state_bytes / summary.parameters:.3f} bytes/parameter", (position, megabytes[position]), (0, 7),
            textcoords="offset points", ha="center", va="bottom", size=9,
        )  # fmt: skip
    axes.set_ylim(0, 1.15 * max(megabytes))
    axes.set_xlim(-0.5, len(runs) - 0.5)
    axes.set_title("Optimizer state, megabytes")
    axes.set_xlabel(f"for a model of {summary.parameters:,} parameters")
    axes.tick_params(axis="x", length=0)
    # Every bar says its value.
    axes.yaxis.set_visible(False)
    axes.spines["left"].set_visible(False)
