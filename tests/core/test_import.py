"""`import adafactor` costs nothing: no framework, no native code."""

import subprocess
import sys

import needed
import pytest

import adafactor

FRAMEWORKS = {"jax", "jaxlib", "keras", "optax", "tensorflow", "torch", "triton"}


def imported_by(statement):
    """The modules that a fresh interpreter holds after ``statement``, and the packages they are in."""
    code = f"import sys\n{statement}\nprint(*sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    names = set(result.stdout.split())
    return names | {name.split(".")[0] for name in names}


@pytest.mark.parametrize("module", ["adafactor", "adafactor.core.factoring", "adafactor.core.reference"])
def test_importing_the_core_imports_no_framework(module):
    assert imported_by(f"import {module}") & FRAMEWORKS == set()


def test_the_check_above_can_fail():
    stand_in = "import types; sys.modules['torch.nn'] = types.ModuleType('torch.nn')"
    assert imported_by(f"{stand_in}; import adafactor") & FRAMEWORKS == {"torch"}


def loaded_by(statement):
    """Packages of adafactor, two names deep, and frameworks that a fresh interpreter holds after ``statement``."""
    code = f"import sys\n{statement}\nprint(*sys.modules)"
    names = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    own = {".".join(name.split(".")[1:3]) for name in names if name.startswith("adafactor.")}
    return {name for name in own if name.partition(".")[0] != "core"}, {name.split(".")[0] for name in names} & (
        FRAMEWORKS | {"flax", "h5py", "msgpack", "orbax", "safetensors"}
    )


def test_the_torch_front_end_loads_torch_at_most():
    needed.packages("torch")
    own, frameworks = loaded_by("import adafactor.torch")
    assert {name for name in own if name.partition(".")[0] != "torch"} <= {"engine", "engine.torch"}
    assert frameworks - {"triton"} == {"torch"}  # which imports Triton where that is installed


def test_the_check_of_the_torch_front_end_can_fail():
    needed.packages("torch")
    assert "convert.state" in loaded_by("import adafactor.torch; import adafactor.convert")[0]


@pytest.mark.parametrize(
    ("front_end", "own"), [("torch", {"torch", "triton"}), ("optax", {"jax", "jaxlib", "optax"}), ("keras", None)]
)
def test_a_front_end_imports_neither_another_framework_nor_what_converts(front_end, own):
    needed.packages(front_end)
    found = imported_by(f"import adafactor.{front_end}")
    assert own is None or found & FRAMEWORKS <= own  # Keras imports its backend, and TensorFlow where there is one
    assert f"adafactor.{front_end}" in found
    assert not {name for name in found if name.startswith(("adafactor.convert", "adafactor.planning", "adafactor.cli"))}


def test_adafactor_without_its_framework_is_an_error_that_shows_the_line():
    with pytest.raises(ImportError, match=r"from adafactor\.keras import Adafactor"):
        from adafactor import Adafactor  # noqa: F401
    assert not hasattr(adafactor, "Adafactor")  # who imports a class by its path asks on the way


def test_any_other_name_is_an_ordinary_attribute_error():
    with pytest.raises(AttributeError, match=r"^module 'adafactor' has no attribute 'Adam'$"):
        adafactor.Adam  # noqa: B018


def test_what_is_exported_exists():
    assert all(hasattr(adafactor, name) for name in adafactor.__all__)
