"""Conversions need all frameworks in one process; Keras runs on PyTorch here."""

import os

os.environ["KERAS_BACKEND"] = "torch"

import keras
import pytest
from quiet_torch import _quiet_torch  # noqa: F401


@pytest.fixture(autouse=True)
def _seeded():
    keras.utils.set_random_seed(0)
