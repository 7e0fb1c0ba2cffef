"""A plugin, ``-p installed``: the tests are of the package that is installed, not of a checkout's sources."""

import sys
from pathlib import Path

import pytest

import adafactor


def pytest_configure(config):
    where = Path(adafactor.__file__)
    if not where.is_relative_to(Path(sys.prefix)):
        raise pytest.UsageError(f"adafactor is that of {where}, not the one installed in {sys.prefix}")
