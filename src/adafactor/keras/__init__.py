"""Adafactor for Keras 3, on TensorFlow, JAX and PyTorch.

from adafactor.keras import Adafactor

model.compile(optimizer=Adafactor(1e-2), loss=...)
"""

from adafactor.keras.diagnostics import Diagnostics
from adafactor.keras.optimizer import Adafactor

__all__ = ["Adafactor", "Diagnostics"]

Adafactor.__module__ = __name__  # the name under which Keras's files find the class again
