"""The demo from the first step to the last file. Importing this imports Keras."""

from __future__ import annotations

import time
from typing import Any

import keras

from adafactor.cli.demo import model as transformer
from adafactor.cli.demo import picture, report
from adafactor.cli.demo.interrupt import Interrupt
from adafactor.cli.demo.resume import resume
from adafactor.cli.demo.sample import generate
from adafactor.cli.demo.settings import (
    BATCH,
    CONTEXT,
    KEYS,
    RESUME_STEPS,
    SAMPLE_BYTES,
    SIZES,
    VALIDATION_WINDOWS,
    Settings,
)
from adafactor.cli.demo.text import Text, validation_set
from adafactor.cli.demo.train import Batches, Run, train
from adafactor.cli.terminal import transient

PROMPT_BYTES = 64


def run(settings: Settings, text: Text, began: float) -> int:
    """Train, report and save; 0, or 130 after Ctrl-C. ``began``: ``time.perf_counter()`` at the start."""
    with Interrupt() as interrupt:
        keras.utils.set_random_seed(settings.seed)
        model = transformer.build(SIZES[settings.size], CONTEXT)
        start = model.get_weights()
        transient("")
        print(
            f"Model: {model.count_params():,} parameters, {settings.size}. "
            f"{settings.steps} steps of {BATCH} x {CONTEXT} bytes for each optimizer, Keras {keras.__version__} "
            f"on {settings.backend}.\n",
            flush=True,
        )
        runs = _train_all(settings, text, model, start, interrupt)
        summary = report.Summary(settings, text, {v.path: tuple(v.shape) for v in model.trainable_variables}, runs)
        if not interrupt.requested:
            transient("Writing text …")
            first = validation_set(text, VALIDATION_WINDOWS, CONTEXT)[0][0]
            prompt = first.astype("uint8").tobytes()[:PROMPT_BYTES]
            written = generate(model, prompt, SAMPLE_BYTES, settings.seed, lambda: interrupt.requested)
            summary.sample = (prompt, written)
        if not interrupt.requested:
            transient("Loading the saved model and resuming …")
            batches = Batches(text, settings.seed, settings.steps, RESUME_STEPS)
            summary.resume = resume(model, settings.out / runs[-1].file, batches)
        transient("")
        summary.interrupted = interrupt.requested
        if runs:
            picture.draw(summary, settings.out / "demo.png")
        summary.seconds = time.perf_counter() - began
        report.write(summary, settings.out / "demo.json")
        print(report.text(summary), flush=True)
    return 130 if interrupt.requested else 0


def _train_all(settings: Settings, text: Text, model: Any, start: list[Any], interrupt: Interrupt) -> list[Run]:
    """One run after the other on the same model, set back to the same start. It ends as the last one left it."""
    wide = keras.Variable(keras.ops.zeros((4096, 4096), "float32"), dtype="float32", name="wide")
    runs: list[Run] = []
    for key in KEYS:
        if interrupt.requested:
            break
        model.set_weights(start)
        run = train(
            key, model, text,
            steps=settings.steps, seed=settings.seed, wide=wide, out=settings.out, interrupt=interrupt,
        )  # fmt: skip
        runs.append(run)
    return runs
