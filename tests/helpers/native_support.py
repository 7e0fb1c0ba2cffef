"""What a test does that needs the native kernels, where there are none."""

import os

import pytest


def need(reason, allow_module_level=False):
    """Skip for ``reason`` (``None``: there are kernels); fail where ADAFACTOR_REQUIRE_NATIVE=1 insists on them."""
    if reason is None:
        return
    if os.environ.get("ADAFACTOR_REQUIRE_NATIVE") == "1":
        pytest.fail(str(reason), pytrace=False)
    pytest.skip(str(reason), allow_module_level=allow_module_level)
