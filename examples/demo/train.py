"""One optimizer's run with Keras's ``fit``: train, watch, measure, save."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import keras
import numpy as np

from adafactor.cli.demo import optimizers
from adafactor.cli.demo.interrupt import Interrupt
from adafactor.cli.demo.settings import BATCH, CONTEXT, LABELS, VALIDATION_WINDOWS, Key
from adafactor.cli.demo.text import Text, training_batch, validation_set
from adafactor.cli.table import clock
from adafactor.cli.terminal import transient


@dataclass(slots=True)
class Run:
    """What was measured of one optimizer.

    Attributes:
        losses: of every training step, in nats per byte.
        step_seconds: of every training step; the first one compiles.
        validation_loss: mean over the held-out windows, in nats per byte.
        state_bytes: of all its variables.
        matrix_bytes: of its statistics for the model's matrices, the variables of rank 2.
        wide_bytes: of its statistics for one 4096 x 4096 float32 kernel.
        file, file_bytes: the saved model.
    """

    key: Key
    losses: list[float]
    step_seconds: list[float]
    validation_loss: float
    state_bytes: int
    matrix_bytes: int
    wide_bytes: int
    file: str
    file_bytes: int

    @property
    def steps(self) -> int:
        return len(self.losses)

    @property
    def median_milliseconds(self) -> float:
        """Of a step; the first, which compiles, counts only if there is no other."""
        return float(np.median(self.step_seconds[1:] or self.step_seconds)) * 1e3


class Batches(keras.utils.PyDataset):  # type: ignore[misc]
    """Steps ``first`` to ``first + count - 1`` of the run ``seed``, as ``fit`` reads them."""

    def __init__(self, text: Text, seed: int, first: int, count: int) -> None:
        super().__init__()
        self._text, self._seed, self._first, self._count = text, seed, first, count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Any:
        return training_batch(self._text, self._seed, self._first + index, BATCH, CONTEXT)


class Watch(keras.callbacks.Callback):  # type: ignore[misc]
    """Collects loss and time of every step, shows one line that is rewritten, and stops when asked to."""

    def __init__(self, label: str, steps: int, interrupt: Interrupt) -> None:
        super().__init__()
        self._label, self._steps, self._interrupt = label, steps, interrupt
        self._terminal = sys.stdout.isatty()
        self._total = 0.0
        self._began = 0.0
        self.losses: list[float] = []
        self.seconds: list[float] = []

    def on_train_begin(self, logs: Any = None) -> None:
        transient(f"{self._label:<16} compiling …")
        self._began = time.perf_counter()

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        now = time.perf_counter()
        self.seconds.append(now - self._began)
        self._began = now
        # Keras reports the mean over the steps so far; the difference of two sums is this step's loss.
        total = logs["loss"] * (len(self.losses) + 1)
        self.losses.append(total - self._total)
        self._total = total
        self._progress()
        if self._interrupt.requested:
            self.model.stop_training = True

    def _progress(self) -> None:
        done = len(self.losses)
        if not self._terminal and done not in {1, self._steps} and done % max(1, self._steps // 10):
            return
        if done == 1:
            speed = f"compiled in {self.seconds[0]:.1f} s"
        else:
            each = float(np.median(self.seconds[1:][-50:]))
            speed = f"{each * 1e3:5.0f} ms/step   {clock(each * (self._steps - done))} left"
        position = f"step {done:>{len(str(self._steps))}}/{self._steps}"
        self._show(f"{position}   loss {np.mean(self.losses[-20:]):.3f}   {speed}")

    def on_train_end(self, logs: Any = None) -> None:
        if self._terminal:
            print(flush=True)

    def _show(self, text: str) -> None:
        line = f"{self._label:<16} {text}"
        if self._terminal:
            transient(line)
        else:
            print(line, flush=True)


def train(
    key: Key, model: Any, text: Text, *, steps: int, seed: int, wide: Any, out: Path, interrupt: Interrupt
) -> Run:
    """Train ``model`` with the optimizer ``key``, evaluate and save it; the model is changed in place.

    Args:
        wide: the 4096 x 4096 variable to measure the optimizer's state on.
        out: the folder to save to.
    """
    optimizer = optimizers.make(key, steps)
    model.compile(optimizer=optimizer, loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    watch = Watch(LABELS[key], steps, interrupt)
    model.fit(Batches(text, seed, 0, steps), epochs=1, verbose=0, callbacks=[watch], shuffle=False)
    inputs, targets = validation_set(text, VALIDATION_WINDOWS, CONTEXT)
    validation_loss = model.evaluate(inputs, targets, batch_size=BATCH * 4, verbose=0)
    file = out / f"{key}.keras"
    model.save(file)
    matrices = [variable for variable in model.trainable_variables if len(variable.shape) >= 2]
    return Run(
        key=key,
        losses=watch.losses,
        step_seconds=watch.seconds,
        validation_loss=float(validation_loss),
        state_bytes=optimizers.state_bytes(optimizer),
        matrix_bytes=optimizers.statistics_bytes(optimizers.make(key, steps), matrices),
        wide_bytes=optimizers.statistics_bytes(optimizers.make(key, steps), [wide]),
        file=file.name,
        file_bytes=file.stat().st_size,
    )
