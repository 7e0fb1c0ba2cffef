"""Conversions need all frameworks in one process; Keras runs on PyTorch here."""

import os

os.environ["KERAS_BACKEND"] = "torch"

import keras
import pytest
import torch


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    keras.utils.set_random_seed(0)  # PyTorch's and NumPy's too
    yield
    torch.set_num_threads(threads)
