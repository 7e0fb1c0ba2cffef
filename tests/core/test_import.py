"""`import adafactor` costs nothing: no framework, no native code."""

import subprocess
import sys

import pytest

import adafactor

FRAMEWORKS = {"jax", "jaxlib", "keras", "optax", "tensorflow", "torch", "triton"}


def imported_by(statement):
    """The top-level modules that a fresh interpreter holds after ``statement``."""
    code = f"import sys\n{statement}\n"
    code += "print(*sorted({name.split('.')[0] for name in sys.modules}))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(result.stdout.split())


@pytest.mark.parametrize("module", ["adafactor", "adafactor.core.factoring", "adafactor.core.reference"])
def test_importing_the_core_imports_no_framework(module):
    assert imported_by(f"import {module}") & FRAMEWORKS == set()


def test_the_check_above_can_fail():
    stand_in = "import types; sys.modules['torch.nn'] = types.ModuleType('torch.nn')"
    assert imported_by(f"{stand_in}; import adafactor") & FRAMEWORKS == {"torch"}


def test_adafactor_without_its_framework_is_an_error_that_shows_the_line():
    with pytest.raises(ImportError, match=r"from adafactor\.keras import Adafactor"):
        from adafactor import Adafactor  # noqa: F401


def test_any_other_name_is_an_ordinary_attribute_error():
    with pytest.raises(AttributeError, match=r"^module 'adafactor' has no attribute 'Adam'$"):
        adafactor.Adam  # noqa: B018


def test_what_is_exported_exists():
    assert all(hasattr(adafactor, name) for name in adafactor.__all__)
