"""The demo in one picture: how fast each optimizer learned, and what it kept in memory for that."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from adafactor.cli.demo.report import Summary
from adafactor.cli.demo.settings import LABELS, Key
from adafactor.cli.demo.train import Run

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
        window = max(1, min(25, run.steps // 8))
        smooth = np.convolve(run.losses, np.ones(window) / window, "valid")
        steps = np.arange(1, run.steps + 1)
        # Two Adafactors with the same hyperparameters draw the same curve: dashes on top let both be seen.
        ours = run.key == "adafactor"
        axes.plot(steps, run.losses, color=colour, alpha=0.15, linewidth=0.7)
        axes.plot(
            steps[window - 1 :], smooth, color=colour, linewidth=1.8 if ours else 3.2,
            linestyle=(0, (4, 2)) if ours else "-",
            label=f"{LABELS[run.key]}, validation {run.validation_loss:.3f}",
        )  # fmt: skip
        axes.plot(run.steps, run.validation_loss, "o", color=colour, markersize=6 if ours else 9, clip_on=False)
    axes.set_title("Loss, nats per byte")
    axes.set_xlabel("step")
    axes.grid(axis="y", color=FAINT, alpha=0.4, linewidth=0.6)
    axes.set_xlim(left=0)
    axes.legend(frameon=False, title="mean of recent steps, ● on held-out text", alignment="left")


def _bars(axes: Any, summary: Summary) -> None:
    runs = summary.runs
    megabytes = [run.state_bytes / 1e6 for run in runs]
    axes.bar([LABELS[run.key] for run in runs], megabytes, color=[COLOURS[run.key] for run in runs], width=0.62)
    for position, run in enumerate(runs):
        axes.annotate(
            _label(run, summary.parameters), (position, megabytes[position]), (0, 5), textcoords="offset points",
            ha="center", va="bottom", linespacing=1.35,
        )  # fmt: skip
    axes.set_ylim(0, 1.2 * max(megabytes))
    axes.set_title("Optimizer state, megabytes")
    axes.set_xlabel(f"a model of {summary.parameters:,} parameters")
    axes.tick_params(axis="x", length=0)


def _label(run: Run, parameters: int) -> str:
    return f"{run.state_bytes / 1e6:.2f} MB\n{run.state_bytes / parameters:.3f} bytes\nper parameter"
