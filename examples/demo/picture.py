"""The demo in one picture: how fast each optimizer learned, and what it kept in memory for that."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from model import LABELS

# Okabe and Ito's colours: told apart by colour-blind eyes and in grey.
COLOURS = {"adamw": "#999999", "keras-adafactor": "#E69F00", "adafactor": "#0072B2"}
INK, FAINT = "#222222", "#BBBBBB"
STYLE = {
    "font.size": 10, "text.color": INK, "xtick.color": INK, "ytick.color": INK, "axes.labelcolor": INK,
    "axes.edgecolor": FAINT, "axes.spines.top": False, "axes.spines.right": False,
    "axes.titlelocation": "left", "axes.titleweight": "bold", "axes.titlesize": 11, "axes.titlepad": 12,
}  # fmt: skip


def draw(figures: dict[str, Any], file: Path) -> None:
    """Draw to ``file``, in the format its suffix names; no display is needed."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(11, 5), dpi=150, layout="constrained")
        left, right = figure.subplots(1, 2, width_ratios=(1.45, 1))
        losses(left, figures["runs"])
        memory(right, figures["runs"], figures["parameters"])
        figure.savefig(file)


def losses(axes: Any, runs: dict[str, Any]) -> None:
    for key, run in runs.items():
        # Two Adafactors with the same hyperparameters draw the same curve: dashes on top let both be seen.
        width, style, size = (1.8, (0, (4, 2)), 5) if key == "adafactor" else (3.2, "-", 9)
        steps = np.arange(1, run["steps"] + 1)
        label = f"{LABELS[key]}, held-out text {run['validation_loss']:.3f}"
        axes.plot(steps, run["losses"], color=COLOURS[key], alpha=0.15, linewidth=0.7)
        means = [np.mean(run["losses"][max(0, step - 25) : step]) for step in steps]
        axes.plot(steps, means, color=COLOURS[key], linewidth=width, linestyle=style, label=label)
        axes.plot(steps[-1], run["validation_loss"], "o", color=COLOURS[key], markersize=size, clip_on=False)
    axes.set_title("Loss, nats per byte")
    axes.set_xlabel("step")
    axes.grid(axis="y", color=FAINT, alpha=0.4, linewidth=0.6)
    axes.set_xlim(left=0)
    axes.legend(frameon=False, title="lines: mean of recent steps; dots: held-out text", alignment="left")


def memory(axes: Any, runs: dict[str, Any], parameters: int) -> None:
    heights = [run["state_bytes"] / 1e6 for run in runs.values()]
    colours = [COLOURS[key] for key in runs]
    # The edge keeps a bar visible that is thinner than a line.
    bars = axes.bar([LABELS[key] for key in runs], heights, color=colours, edgecolor=colours, width=0.62)
    axes.bar_label(bars, [f"{height:.2f} MB" for height in heights], padding=22, weight="bold", size=13)
    each = [f"{run['state_bytes_per_parameter']:.3f} bytes/parameter" for run in runs.values()]
    axes.bar_label(bars, each, padding=7, size=9)
    axes.set_ylim(0, 1.15 * max(heights))
    axes.set_xlim(-0.5, len(runs) - 0.5)
    axes.set_title("Optimizer state, megabytes")
    axes.set_xlabel(f"for a model of {parameters:,} parameters")
    axes.tick_params(axis="x", length=0)
    # Every bar says its value.
    axes.yaxis.set_visible(False)
    axes.spines["left"].set_visible(False)
