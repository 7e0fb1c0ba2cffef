"""``pytest tests/robustness --times N``: N times as many examples, kills and steps.

One Keras backend per run (``KERAS_BACKEND``), as in ``tests/keras``.
"""

import os

os.environ.setdefault("KERAS_BACKEND", "torch")

import properties
import pytest


def pytest_addoption(parser):
    parser.addoption("--times", type=int, default=1, help="how many times the usual examples, kills and steps")


def pytest_configure(config):
    properties.TIMES = config.getoption("--times", 1)


@pytest.fixture
def times():
    return properties.TIMES
