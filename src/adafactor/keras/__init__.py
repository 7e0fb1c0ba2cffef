"""Adafactor for Keras 3, on TensorFlow, JAX and PyTorch.

from adafactor.keras import Adafactor

model.compile(optimizer=Adafactor(1e-2), loss=...)
"""

import keras

from adafactor.core.errors import message

if tuple(map(int, keras.__version__.split(".")[:2])) < (3, 10):  # before what follows asks for what came with it
    raise ImportError(message("the version of Keras", ">= 3.10", keras.__version__, "Run pip install -U keras."))

from adafactor.keras.diagnostics import Diagnostics
from adafactor.keras.optimizer import Adafactor

__all__ = ["Adafactor", "Diagnostics"]

Adafactor.__module__ = __name__  # the name under which Keras's files find the class again
