"""What a test does that needs packages in processes of its own: it imports none of them here.

Importing costs seconds, and what is imported stays: Triton after TensorFlow ends the process (``triton_first``).
"""

from importlib.util import find_spec

import pytest


def packages(*names):
    """Skip where one is not installed."""
    for name in names:
        if find_spec(name) is None:
            pytest.skip(f"{name} is not installed")
