"""Build the wheel where no framework is installed, and test it as users have it, in an environment per framework.

    python scripts/wheel.py                                   # the oldest and the newest of each framework
    python scripts/wheel.py tensorflow-cpu==2.19.1 jax==0.7.2,keras==3.12.0
    python scripts/wheel.py --wheel dist/adafactor-0.1.0-py3-none-linux_x86_64.whl jax==0.10.2

An environment holds the wheel, one framework, Keras, and what the tests import. In it a model is fitted, `adafactor
doctor` has to find the native kernels, and the agreement tests run from a copy of tests/ that has no sources beside it.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

ROOT = Path(__file__).parents[1]


class Framework(NamedTuple):
    """The backend's name in Keras, what else is installed, and the tests."""

    backend: str
    packages: tuple[str, ...]
    tests: tuple[str, ...]


FRAMEWORKS = {
    "tensorflow-cpu": Framework("tensorflow", (), ("keras/test_agreement.py", "keras/test_tensorflow_op.py")),
    "jax": Framework(
        "jax",
        ("optax", "flax"),
        (
            "engine/xla",
            "optax/test_agreement.py",
            "optax/test_copies.py",
            "optax/test_lowering.py",
            "optax/test_keras.py",
        ),
    ),
    "torch": Framework(
        "torch", (), ("torch/test_agreement.py", "torch/test_torch_optim.py", "keras/test_agreement.py")
    ),
}
#: The newest are those of constraints.txt. torch's oldest, 2.6, is not here: that release comes with gigabytes of CUDA.
DEFAULT = (
    *("tensorflow-cpu==2.18.1,keras==3.10.0", "tensorflow-cpu==2.21.0"),
    *("jax==0.6.2,keras==3.10.0", "jax==0.10.2", "torch==2.13.0,keras==3.10.0"),
)

FIT = """
import keras, numpy as np
from adafactor.keras import Adafactor
keras.utils.set_random_seed(0)
model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(16, "relu"), keras.layers.Dense(1)])
model.compile(optimizer=Adafactor(0.05), loss="mse")
x = np.random.default_rng(0).normal(size=(64, 8))
losses = model.fit(x, x.sum(1), epochs=20, verbose=0).history["loss"]
assert losses[-1] < losses[0] / 2, losses
print(f"fit: the loss went from {losses[0]:.2f} to {losses[-1]:.2f}")
"""


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    """Run a program outside this checkout; what it printed, which is shown too where it failed."""
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "ADAFACTOR_LIBRARY")}
    done = subprocess.run(
        command, cwd=cwd, env=kept | environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    if done.returncode:
        sys.exit(f"{done.stdout[-6000:]}\n{' '.join(map(str, command))}: exit code {done.returncode}")
    return done.stdout


def environment(place: Path, *packages: str | Path) -> Path:
    """Its Python, with these packages from the index."""
    venv.create(place, with_pip=True)
    python = place / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    if packages:
        run(python, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", *packages, cwd=place)
    return python


def build(place: Path) -> Path:
    """The wheel, with its kernels, from an environment that holds nothing."""
    python = environment(place / "build")
    run(python, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", place, ROOT, cwd=place)
    (wheel,) = place.glob("*.whl")
    if wheel.name.endswith("-any.whl"):
        sys.exit(f"{wheel.name} has no native kernels: is there a compiler?")
    return wheel


def test(wheel: Path, requirement: str, place: Path) -> str:
    """What ran with this framework, in one line."""
    backend, packages, tests = FRAMEWORKS[requirement.partition("==")[0]]
    asked = (*requirement.split(","), "keras>=3.10")
    python = environment(place / "venv", wheel, *asked, *packages, "pytest>=9", "ml_dtypes", "psutil")
    tree = place / "tree"
    shutil.copytree(ROOT / "tests", tree / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tree)
    variables = {"KERAS_BACKEND": backend, "TF_CPP_MIN_LOG_LEVEL": "3", "ADAFACTOR_REQUIRE_NATIVE": "1"}
    empty = place / "empty"
    empty.mkdir()
    fitted = run(python, "-c", FIT, cwd=empty, **variables)
    doctor = run(python, "-m", "adafactor.cli", "doctor", cwd=empty, **variables)
    reached = [line for line in doctor.splitlines() if line.startswith(f"adafactor.keras on {backend}: works")]
    if not (
        reached and "native kernels" in reached[0] and "no native kernels" not in doctor and "without" not in doctor
    ):
        sys.exit(f"{requirement}: the native kernels were not reached.\n{doctor}")
    done = []
    for part in dict.fromkeys(name.partition("/")[0] for name in tests):  # a process each: their conftests differ
        files = [f"tests/{name}" for name in tests if name.startswith(part)]
        options = ("-q", "-p", "installed", "-p", "no:cacheprovider")
        helpers = str(tree / "tests" / "helpers")
        done.append(
            run(python, "-m", "pytest", *options, *files, cwd=tree, PYTHONPATH=helpers, **variables).splitlines()[-1]
        )
    return "\n  ".join((f"{requirement}: {fitted.splitlines()[-1]}", reached[0], *done))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("frameworks", nargs="*", default=DEFAULT, help=f"requirements of {', '.join(FRAMEWORKS)}")
    parser.add_argument("--wheel", type=Path, help="this one in place of a new one")
    options = parser.parse_args()
    with TemporaryDirectory() as name:
        place = Path(name)
        wheel = options.wheel.resolve() if options.wheel else build(place)
        print(f"{wheel.name}: {wheel.stat().st_size / 1000:.0f} kB", flush=True)
        for number, requirement in enumerate(options.frameworks):
            its = place / str(number)
            its.mkdir()
            print(test(wheel, requirement, its), flush=True)
            shutil.rmtree(its)


if __name__ == "__main__":
    main()
