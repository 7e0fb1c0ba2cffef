"""What docs/numerics.md says of rounding holds."""

import re

import pages
import pytest
import rounding_error
from native_support import need
from tolerances import ONE_ROUNDING, TOLERANCES

from adafactor.core import native


@pytest.mark.parametrize("name", rounding_error.IMPLEMENTATIONS)
def test_the_clip_factor_is_right_to_float32(name):
    if name == "native kernels":
        need(native.why_not())
    assert rounding_error.worst(rounding_error.IMPLEMENTATIONS[name], problems=12, steps=5) < 1.5e-6


@pytest.mark.parametrize("fused", [False, True], ids=["torch operations", "native kernels"])
def test_statistics_are_right_to_float32(fused):
    if fused:
        need(native.why_not())
    assert max(rounding_error.of_statistics((65536, 16), fused)) < 1e-5


def cell(tolerance):
    """As the page writes it: a power of two by its exponent, nothing where nothing is held."""
    if tolerance is None or tolerance == ONE_ROUNDING:
        return tolerance or ""
    return "2⁻⁷" if tolerance == 2**-7 else f"{tolerance:.0e}".replace("e-0", "e-")


def test_the_tolerances_are_those_of_the_tests():
    table = (pages.ROOT / "docs/numerics.md").read_text().split("## What the tests hold")[1]
    rows = [[cell.strip() for cell in row.split("|")[1:-1]] for row in re.findall(r"^\|.*\|$", table, re.MULTILINE)[2:]]
    dtypes = ("float64", "float32", "float16", "bfloat16")
    assert [row[2:-1] for row in rows] == [[cell(held.get(dtype)) for dtype in dtypes] for held in TOLERANCES.values()]
    for (*_, test), name in zip(rows, TOLERANCES, strict=True):
        source = (pages.ROOT / test.strip("`")).read_text()
        assert f'TOLERANCES["{name}"]' in source or f'Trajectory("{name}"' in source, test
