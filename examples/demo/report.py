"""The figures of a demo as a table for people. Nothing here is computed from a formula."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

from model import LABELS

from adafactor.cli.terminal import table


def text(figures: dict[str, Any], out: Path) -> str:
    """What stands on the terminal at the end."""
    if not figures["runs"]:
        return "Interrupted before the first step: nothing to report."
    paragraphs = [measured(figures["runs"], figures["parameters"])]
    if sample := figures["sample"]:
        tail = " ".join(printable(sample["prompt"]).split())[-30:]
        paragraphs.append(f"Text by adafactor's model, after the held-out “{tail}”:\n{quoted(sample['text'])}")
    if resume := figures["resume"]:
        compared = f"{resume['variables']} variables of model and optimizer after {resume['steps']} more steps"
        found = f"{compared} are equal to the uninterrupted run's, bit for bit."
        if differing := resume["differing"]:
            found = f"{len(differing)} of {compared} DIFFER from the uninterrupted run's: {', '.join(differing[:3])}"
        paragraphs.append(f"Saved, loaded, resumed: {found}")
    names = ", ".join(["demo.png", "demo.json", *(run["file"] for run in figures["runs"].values())])
    end = "Interrupted. " if figures["interrupted"] else ""
    paragraphs.append(f"{end}It took {clock(figures['seconds'])} minutes. In {out}: {names}")
    return "\n\n".join(paragraphs)


def measured(runs: dict[str, Any], parameters: int) -> str:
    def row(label: str, form: str, key: str, scale: float = 1) -> list[str]:
        return [label, *(format(run[key] * scale, form) for run in runs.values())]

    def factors(key: str) -> list[list[str]]:
        if "keras-adafactor" not in runs:
            return []
        times = [runs["keras-adafactor"][key] / run[key] for run in runs.values()]
        return [["    times less than Keras Adafactor", *(f"{x:,.1f}" if x < 10 else f"{x:,.0f}" for x in times)]]

    matrices, wide = "state_bytes_of_matrices", "state_bytes_of_a_4096x4096_kernel"
    rows = [
        ["parameters", *(f"{parameters:,}" for _ in runs)],
        row("optimizer state, bytes", ",", "state_bytes"),
        row("  per parameter", ".3f", "state_bytes_per_parameter"),
        row("  of the model's matrices, bytes", ",", matrices),
        *factors(matrices),
        row("  of one 4096 x 4096 kernel, bytes", ",", wide),
        *factors(wide),
        row("steps", ",", "steps"),
        row("validation loss, nats per byte", ".4f", "validation_loss"),
        row("time per step, ms (median)", ".0f", "median_milliseconds_per_step"),
        row("saved model with optimizer, MB", ".1f", "file_bytes", 1e-6),
    ]
    return table(["measured", *map(LABELS.__getitem__, runs)], rows)


def quoted(block: str) -> str:
    lines = printable(block).split("\n")
    wrapped = (part for line in lines for part in textwrap.wrap(line, 100, drop_whitespace=False) or [""])
    return "\n".join(f"  │ {line}".rstrip() for line in wrapped)


def printable(text: str) -> str:
    """For a terminal: what is no text, and what would move the cursor, becomes a visible mark."""
    return "".join(c if c == "\n" or c.isprintable() else " " if c == "\t" else "�" for c in text)


def clock(seconds: float) -> str:
    """``m:ss``."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02d}"
