"""The three optimizers, with the hyperparameters they are compared at, and what their state weighs."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import keras
import numpy as np

from adafactor.cli.demo.settings import Key
from adafactor.keras import Adafactor

#: Peak learning rates. Adafactor's is relative: it is multiplied by each variable's root mean square.
ADAMW, ADAFACTOR = 1e-3, 2e-2

_GLOBAL = {"iteration", "learning_rate"}


def make(key: Key, steps: int) -> Any:
    """A new optimizer for a run of ``steps`` steps: a tenth of them to warm up, then a cosine down to a tenth."""
    match key:
        case "adamw":
            return keras.optimizers.AdamW(_schedule(ADAMW, steps), weight_decay=0.01)
        case "keras-adafactor":
            return keras.optimizers.Adafactor(_schedule(ADAFACTOR, steps))
        case "adafactor":
            # Keras caps every learning rate at 1/sqrt(t), schedules too. To compare like with like, so do we here.
            return Adafactor(_schedule(ADAFACTOR, steps), relative_step="always")


def _schedule(peak: float, steps: int) -> Any:
    warmup = steps // 10
    return keras.optimizers.schedules.CosineDecay(
        initial_learning_rate=peak / 10 if warmup else peak,
        decay_steps=steps - warmup,
        alpha=0.1,  # of the peak: never 0, so that a resumed run still has something to do
        warmup_target=peak if warmup else None,
        warmup_steps=warmup,
    )


def state_bytes(optimizer: Any) -> int:
    """Bytes of every variable of a built optimizer, iteration and learning rate included."""
    return sum(map(_bytes, optimizer.variables))


def statistics_bytes(optimizer: Any, variables: Iterable[Any]) -> int:
    """Bytes that a new optimizer keeps for ``variables`` besides iteration and learning rate: built and counted."""
    optimizer.build(list(variables))
    return sum(_bytes(variable) for variable in optimizer.variables if variable.name not in _GLOBAL)


def _bytes(variable: Any) -> int:
    itemsize = 2 if variable.dtype == "bfloat16" else np.dtype(variable.dtype).itemsize
    return int(math.prod(variable.shape)) * itemsize
