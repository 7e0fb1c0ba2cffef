"""The demo from the first step to the last file: train, measure, save, sample, resume. Importing this imports Keras."""

from __future__ import annotations

import argparse
import json
import math
import platform
import signal
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import keras
import model as transformer
import numpy as np
import picture
import report
from text import Text, training_batch, validation_set

from adafactor import __version__
from adafactor.cli.terminal import transient

BATCH = 4  # windows per step: many cheap steps learn more in a minute than few good ones
VALIDATION_WINDOWS, RESUME_STEPS, PROMPT_BYTES, SAMPLE_BYTES = 128, 5, 64, 320


class Stop:
    """True once Ctrl-C was pressed; the second Ctrl-C raises ``KeyboardInterrupt``.

    An exception in the middle of a step would leave the model without weights: Keras on JAX gives their memory
    away when a step begins and puts the new ones back when training ends.
    """

    def __init__(self) -> None:
        self.requested = False
        signal.signal(signal.SIGINT, self._request)

    def __bool__(self) -> bool:
        return self.requested

    def _request(self, *_: object) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        print("\nStopping after this step to report and save. Ctrl-C again quits at once.", file=sys.stderr, flush=True)


def batches(settings: argparse.Namespace, text: Text, steps: range) -> Iterator[Any]:
    for step in steps:
        yield training_batch(text, settings.seed, step, BATCH, settings.context)


class Watch(keras.callbacks.Callback):
    """Collects loss and time of every step, shows one line that is rewritten, and stops when asked to."""

    def __init__(self, label: str, steps: int, stop: Stop) -> None:
        super().__init__()
        self.label, self.steps, self.stop = label, steps, stop
        self.terminal = sys.stdout.isatty()
        self.losses, self.seconds, self.total = list[float](), list[float](), 0.0

    def on_train_begin(self, logs: Any = None) -> None:
        transient(f"{self.label:<16} compiling …")
        self.began = time.perf_counter()

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        now = time.perf_counter()
        self.seconds.append(now - self.began)
        self.began = now
        # Keras reports the mean over the steps so far; the difference of two sums is this step's loss.
        total = logs["loss"] * (batch + 1)
        self.losses.append(total - self.total)
        self.total = total
        self._progress(batch + 1)
        self.model.stop_training = bool(self.stop)

    def _progress(self, done: int) -> None:
        if not self.terminal and done not in {1, self.steps} and done % max(1, self.steps // 10):
            return
        speed = f"compiled in {self.seconds[0]:.1f} s"
        if done > 1:
            each = float(np.median(self.seconds[1:][-50:]))
            speed = f"{each * 1e3:5.0f} ms/step   {report.clock(each * (self.steps - done))} left"
        position = f"step {done:>{len(str(self.steps))}}/{self.steps}"
        line = f"{self.label:<16} {position}   loss {np.mean(self.losses[-20:]):.3f}   {speed}"
        transient(line) if self.terminal else print(line, flush=True)

    def on_train_end(self, logs: Any = None) -> None:
        if self.terminal:
            print(flush=True)


def run(settings: argparse.Namespace, text: Text, began: float) -> int:
    """Train, report and save; 0, or 130 after Ctrl-C. ``began``: ``time.perf_counter()`` at the start."""
    stop = Stop()
    keras.utils.set_random_seed(settings.seed)
    model = transformer.build(*settings.shape, settings.context)
    shapes = {v.path: tuple(v.shape) for v in model.trainable_variables}
    transient("")
    print(
        f"Model: {model.count_params():,} parameters, {settings.size}. {settings.steps} steps of {BATCH} x "
        f"{settings.context} bytes for each optimizer, Keras {keras.__version__} on {settings.backend}.\n",
        flush=True,
    )
    figures: dict[str, Any] = {
        "adafactor": __version__, "keras": keras.__version__, "python": platform.python_version(),
        "backend": settings.backend, "size": settings.size, "steps": settings.steps, "seed": settings.seed,
        "batch": BATCH, "context": settings.context, "text": text.data(),
        "parameters": sum(map(math.prod, shapes.values())), "shapes": shapes, "runs": {},
    }  # fmt: skip
    held_out = validation_set(text, VALIDATION_WINDOWS, settings.context)
    start = model.get_weights()
    for key in transformer.LABELS:
        if not stop:  # each from the same start; the model ends as the last one leaves it
            model.set_weights(start)
            figures["runs"][key] = train(key, model, settings, text, held_out, stop)
    figures["sample"] = figures["resume"] = None
    if not stop:
        transient("Writing text …")
        prompt = held_out[0][0][:PROMPT_BYTES].astype(np.uint8).tobytes()
        written = generate(model, prompt, settings.context, np.random.default_rng(settings.seed), stop)
        figures["sample"] = {"prompt": prompt.decode("utf-8", "replace"), "text": written.decode("utf-8", "replace")}
    if not stop:
        transient("Loading the saved model and resuming …")
        data = list(batches(settings, text, range(settings.steps, settings.steps + RESUME_STEPS)))
        figures["resume"] = resume(model, settings.out / "adafactor.keras", data)
    transient("")
    if figures["runs"]:
        picture.draw(figures, settings.out / "demo.png")
    figures |= {"interrupted": bool(stop), "seconds": time.perf_counter() - began}
    (settings.out / "demo.json").write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    print(report.text(figures, settings.out), flush=True)
    return 130 if stop else 0


def train(
    key: str, model: Any, settings: argparse.Namespace, text: Text, held_out: tuple[Any, Any], stop: Stop
) -> dict[str, Any]:
    """Train ``model`` in place with the optimizer ``key``, evaluate and save it; what was measured (nats per byte)."""
    steps = settings.steps
    optimizer = transformer.optimizer(key, steps)
    model.compile(optimizer=optimizer, loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    watch = Watch(transformer.LABELS[key], steps, stop)
    model.fit(batches(settings, text, range(steps)), steps_per_epoch=steps, verbose=0, callbacks=[watch], shuffle=False)
    loss = model.evaluate(*held_out, batch_size=BATCH * 4, verbose=0)
    file = settings.out / f"{key}.keras"
    model.save(file)
    matrices = [variable for variable in model.trainable_variables if len(variable.shape) >= 2]
    wide = [keras.Variable(keras.ops.zeros((4096, 4096)), dtype="float32")]
    whole = sum(map(size_of, optimizer.variables))
    return {
        "steps": len(watch.losses),
        "state_bytes": whole,
        "state_bytes_per_parameter": whole / model.count_params(),
        "state_bytes_of_matrices": statistics_bytes(transformer.optimizer(key, steps), matrices),
        "state_bytes_of_a_4096x4096_kernel": statistics_bytes(transformer.optimizer(key, steps), wide),
        "validation_loss": float(loss),
        # The first step compiles, and counts only if there is no other.
        "median_milliseconds_per_step": float(np.median(watch.seconds[1:] or watch.seconds)) * 1e3,
        "first_step_seconds": watch.seconds[0],
        "file": file.name,
        "file_bytes": file.stat().st_size,
        "losses": watch.losses,
        "step_seconds": watch.seconds,
    }


def statistics_bytes(optimizer: Any, variables: Iterable[Any]) -> int:
    """Bytes that a new optimizer keeps for ``variables`` besides iteration and learning rate: built and counted."""
    optimizer.build(list(variables))
    return sum(size_of(v) for v in optimizer.variables if v.name not in {"iteration", "learning_rate"})


def size_of(variable: Any) -> int:
    return keras.ops.convert_to_numpy(variable).nbytes


def generate(model: Any, prompt: bytes, context: int, rng: np.random.Generator, stop: Stop) -> bytes:
    """What ``model`` writes after ``prompt``, byte by byte; less if ``stop`` says so."""
    written = bytearray(prompt)
    while len(written) < len(prompt) + SAMPLE_BYTES and not stop:
        seen = written[-context:]
        # Attention is causal: what stands behind the last byte seen does not matter.
        tokens = np.zeros((1, context), np.int32)
        tokens[0, : len(seen)] = seen
        logits = model.predict_on_batch(tokens)[0, len(seen) - 1].astype(np.float64) / 0.6  # the temperature
        # Adding Gumbel noise and taking the largest draws from the softmax.
        written.append(int(np.argmax(logits + rng.gumbel(size=logits.shape))))
    return bytes(written[len(prompt) :])


def resume(model: Any, file: Path, batches: list[Any]) -> dict[str, Any]:
    """Load ``file``, train it and ``model``, which it was saved from, on the same batches, and compare bit for bit.

    Compared are the weights and the whole state of the optimizer: iteration and statistics.
    """
    loaded = keras.saving.load_model(file)
    variables = []
    for each in (model, loaded):
        each.fit((batch for batch in batches), steps_per_epoch=len(batches), verbose=0, shuffle=False)
        variables.append([*each.variables, *each.optimizer.variables])
    bits = lambda variable: keras.ops.convert_to_numpy(variable).tobytes()  # noqa: E731
    differing = [one.path for one, other in zip(*variables, strict=True) if bits(one) != bits(other)]
    return {"steps": len(batches), "variables": len(variables[0]), "differing": differing, "bit_equal": not differing}
