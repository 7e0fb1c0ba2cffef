"""The figures of a demo: as a table for people and as JSON for programs. Nothing here is computed from a formula."""

from __future__ import annotations

import dataclasses
import json
import math
import platform
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import keras

from adafactor import __version__
from adafactor.cli.demo.resume import Resume
from adafactor.cli.demo.sample import printable
from adafactor.cli.demo.settings import BATCH, CONTEXT, LABELS, Settings
from adafactor.cli.demo.text import Text
from adafactor.cli.demo.train import Run
from adafactor.cli.table import clock, table


@dataclass(slots=True)
class Summary:
    """Everything a demo found.

    Attributes:
        shapes: of the model's trainable variables, by path.
        sample: a prompt from the held-out text, and what the model wrote after it.
    """

    settings: Settings
    corpus: Text
    shapes: dict[str, tuple[int, ...]]
    runs: list[Run]
    sample: tuple[bytes, bytes] | None = None
    resume: Resume | None = None
    interrupted: bool = False
    seconds: float = 0.0

    @property
    def parameters(self) -> int:
        return sum(map(math.prod, self.shapes.values()))


def text(summary: Summary) -> str:
    """What stands on the terminal at the end."""
    return "\n\n".join(_paragraphs(summary))


def write(summary: Summary, file: Path) -> None:
    """The same and every single loss, as JSON."""
    file.write_text(json.dumps(_data(summary), indent=1) + "\n", encoding="utf-8")


def _paragraphs(summary: Summary) -> list[str]:
    if not summary.runs:
        return ["Interrupted before the first step: nothing to report."]
    paragraphs = [_table(summary)]
    if summary.sample is not None:
        prompt, written = map(printable, summary.sample)
        paragraphs.append(f"Text by adafactor's model, after the held-out “{_tail(prompt)}”:\n{_indent(written)}")
    if summary.resume is not None:
        paragraphs.append(_resumed(summary.resume))
    names = ", ".join(["demo.png", "demo.json", *(run.file for run in summary.runs)])
    end = "Interrupted. " if summary.interrupted else ""
    paragraphs.append(f"{end}It took {clock(summary.seconds)} minutes. In {summary.settings.out}: {names}")
    return paragraphs


def _table(summary: Summary) -> str:
    runs, n = summary.runs, summary.parameters
    keras_adafactor = next((run for run in runs if run.key == "keras-adafactor"), None)
    rows = [
        ["parameters", *(f"{n:,}" for _ in runs)],
        ["optimizer state, bytes", *(f"{run.state_bytes:,}" for run in runs)],
        ["  per parameter", *(f"{run.state_bytes / n:.3f}" for run in runs)],
        ["  of the model's matrices, bytes", *(f"{run.matrix_bytes:,}" for run in runs)],
        ["  of one 4096 x 4096 kernel, bytes", *(f"{run.wide_bytes:,}" for run in runs)],
        ["steps", *(f"{run.steps:,}" for run in runs)],
        ["validation loss, nats per byte", *(f"{run.validation_loss:.4f}" for run in runs)],
        ["time per step, ms (median)", *(f"{run.median_milliseconds:.0f}" for run in runs)],
        ["saved model with optimizer, MB", *(f"{run.file_bytes / 1e6:.1f}" for run in runs)],
    ]
    if keras_adafactor is not None:
        factors = {"matrix_bytes": 4, "wide_bytes": 6}  # the row after which each comes
        for attribute, position in factors.items():
            whole = getattr(keras_adafactor, attribute)
            cells = [_factor(whole / getattr(run, attribute)) for run in runs]
            rows.insert(position, ["    times less than Keras Adafactor", *cells])
    return table(["measured", *(LABELS[run.key] for run in runs)], rows)


def _factor(factor: float) -> str:
    return f"{factor:,.1f}" if factor < 10 else f"{factor:,.0f}"


def _resumed(resume: Resume) -> str:
    compared = f"{resume.variables} variables of model and optimizer after {resume.steps} more steps"
    if resume.bit_equal:
        return f"Saved, loaded, resumed: {compared} are equal to the uninterrupted run's, bit for bit."
    names = ", ".join(resume.differing[:3])
    return f"Saved, loaded, resumed: {len(resume.differing)} of {compared} DIFFER from the uninterrupted run's: {names}"


def _tail(prompt: str) -> str:
    return " ".join(prompt.split())[-30:]


def _indent(block: str) -> str:
    lines = (part for line in block.split("\n") for part in textwrap.wrap(line, 100, drop_whitespace=False) or [""])
    return "\n".join(f"  │ {line}".rstrip() for line in lines)


def _data(summary: Summary) -> dict[str, Any]:
    settings, corpus = summary.settings, summary.corpus
    return {
        "adafactor": __version__,
        "keras": keras.__version__,
        "python": platform.python_version(),
        "backend": settings.backend,
        "size": settings.size,
        "steps": settings.steps,
        "seed": settings.seed,
        "batch": BATCH,
        "context": CONTEXT,
        "text": {
            "name": corpus.name,
            "files": corpus.files,
            "training_bytes": len(corpus.training),
            "validation_bytes": len(corpus.validation),
        },
        "parameters": summary.parameters,
        "shapes": summary.shapes,
        "runs": {run.key: _run(run, summary.parameters) for run in summary.runs},
        "resume": summary.resume and dataclasses.asdict(summary.resume) | {"bit_equal": summary.resume.bit_equal},
        "sample": summary.sample
        and dict(zip(("prompt", "text"), (part.decode("utf-8", "replace") for part in summary.sample), strict=True)),
        "interrupted": summary.interrupted,
        "seconds": summary.seconds,
    }


def _run(run: Run, parameters: int) -> dict[str, Any]:
    return {
        "steps": run.steps,
        "state_bytes": run.state_bytes,
        "state_bytes_per_parameter": run.state_bytes / parameters,
        "state_bytes_of_matrices": run.matrix_bytes,
        "state_bytes_of_a_4096x4096_kernel": run.wide_bytes,
        "validation_loss": run.validation_loss,
        "median_milliseconds_per_step": run.median_milliseconds,
        "first_step_seconds": run.step_seconds[0],
        "file": run.file,
        "file_bytes": run.file_bytes,
        "losses": run.losses,
        "step_seconds": run.step_seconds,
    }
