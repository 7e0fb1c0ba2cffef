"""What runs the pages. Keras is on JAX here; tests/keras runs its pages on the other backends."""

import os

os.environ.setdefault("KERAS_BACKEND", "jax")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import pages
import pytest
import triton_first  # noqa: F401


@pytest.fixture(scope="session")
def ran(tmp_path_factory):
    """Everything the blocks of a page define; a page runs once."""
    names = {}

    def run(page):
        if page not in names:
            names[page] = pages.run(page, tmp_path_factory.mktemp(page.stem))
        return names[page]

    return run
