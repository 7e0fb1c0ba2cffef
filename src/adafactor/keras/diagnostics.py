"""A Keras callback for the diagnostics of the updates."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np

from adafactor.core.errors import message
from adafactor.keras.optimizer import Adafactor


class Diagnostics(keras.callbacks.Callback):
    """Adds the diagnostics of the updates to the logs, where TensorBoard, CSVLogger and the History find them.

    Keys are ``update_rms/<variable's path>``, ``clip_factor/...`` and ``parameter_scale/...``; of several slices the
    largest is taken. The logs of an epoch have the largest value of all that were read in it. Pass it before the
    callbacks that are to see its keys. The optimizer needs ``diagnostics=True``.

    Args:
        every: read after every so many batches, which waits for the device, and put what was read into that batch's
            logs as well; ``None`` reads once, at the end of an epoch.
    """

    def __init__(self, every: int | None = None) -> None:
        super().__init__()
        if every is not None and (isinstance(every, bool) or not isinstance(every, int) or every < 1):
            raise ValueError(message("every", "a number of batches >= 1, or None", every, "None reads once an epoch."))
        self.every = every
        self._largest: dict[str, float] = {}

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        self._optimizer().diagnostics()  # a sentence now, rather than after an epoch

    def on_epoch_begin(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        self._largest = {}

    def on_train_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        if self.every is None or (batch + 1) % self.every:
            return
        if keras.backend.backend() == "jax":
            self.model.jax_state_sync()  # in an epoch the values live in the train step's arrays
        values = self._read()
        if logs is not None:
            logs.update(values)

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        self._read()
        if logs is not None:
            logs.update(self._largest)

    def _read(self) -> dict[str, float]:
        named = self._optimizer().diagnostics()
        values = {f"{name}/{path}": float(np.max(value)) for path, own in named.items() for name, value in own.items()}
        for key, value in values.items():
            self._largest[key] = float(np.maximum(value, self._largest.get(key, value)))  # NaN stays NaN
        return values

    def _optimizer(self) -> Adafactor:
        optimizer = getattr(self.model.optimizer, "inner_optimizer", self.model.optimizer)
        if not isinstance(optimizer, Adafactor):
            remedy = "Compile the model with it."
            raise TypeError(message("the model's optimizer", "adafactor.keras.Adafactor", optimizer, remedy))
        return optimizer
