"""A test of every backend of the PyTorch front end takes the fixture."""

import pytest
import triton_support
from native_support import need

from adafactor.core import native


@pytest.fixture(params=["native", "torch", "triton"])
def fused(request, monkeypatch):
    """The constructor's word for a backend."""
    if request.param == "native":
        need(native.why_not())
    if request.param == "triton":
        pytest.importorskip("triton")
        triton_support.use(monkeypatch)
    return False if request.param == "torch" else None
