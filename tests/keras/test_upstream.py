"""Keras's own tests of its optimizers, from the installed wheel, run against our class."""

import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import keras
import numpy as np
import pytest
from keras.src import optimizers
from keras_support import BACKEND

from adafactor.keras import Adafactor

SUBJECTS = ("adafactor", "optimizer", "optimizer_sparse", "loss_scale_optimizer", "multi_optimizer")
#: At least so many passed when this was written, and at least so many of them made our class.
PASSED, OURS = {"jax": (120, 11), "tensorflow": (122, 10), "torch": (91, 9)}[BACKEND]

DEVIATIONS = {
    row["test"]: row["reason"]
    for row in tomllib.loads(Path(__file__).with_name("upstream_deviations.toml").read_text("utf-8"))["deviation"]
    if BACKEND in row["backends"]
}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """What became of each of Keras's tests, by name."""
    folder = tmp_path_factory.mktemp("upstream")
    (folder / "pytest.ini").write_text("[pytest]\n")
    root = Path(optimizers.__file__).parent
    files = [root / f"{subject}_test.py" for subject in SUBJECTS]
    environment = {"JAX_COMPILATION_CACHE_DIR": str(folder / "jax")} | os.environ
    environment |= {"KERAS_BACKEND": BACKEND, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    environment |= {  # one device, as in Keras's own runs; and JAX compiles each eager operation once
        "XLA_FLAGS": "--xla_backend_optimization_level=0",
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    options = ["-q", "-c", "pytest.ini", f"--rootdir={root}", f"--outcomes={folder}/outcomes.json"]
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "keras_upstream", "-p", "no:cacheprovider", *options, *files],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert ran.returncode in (0, 1), ran.stdout + ran.stderr  # 1: some failed
    return json.loads((folder / "outcomes.json").read_text())


def test_keras_own_tests_pass_but_for_the_listed_deviations(outcomes, capsys):
    results = [each["outcome"] for each in outcomes.values()]
    passed, ours = results.count("passed"), sum(each["ours"] for each in outcomes.values())
    with capsys.disabled():
        print(
            f"\nKeras {keras.__version__} on {BACKEND}: of its own tests {passed} pass, {len(DEVIATIONS)} deviates as "
            f"listed, Keras skips {results.count('skipped')}; {ours} of them make our class."
        )
    unexpected = {name: each["why"] for name, each in outcomes.items() if each["outcome"] == "failed"}
    missing = DEVIATIONS.keys() - unexpected.keys()
    assert not missing, f"These pass, or are gone; take them off the list: {missing}"
    unexpected = {name: why for name, why in unexpected.items() if name not in DEVIATIONS}
    assert not unexpected, "\n\n".join(f"{name}\n{why}" for name, why in unexpected.items())
    assert passed >= PASSED
    assert ours >= OURS


def test_the_golden_numbers_hold_with_relative_step_always():
    optimizer = Adafactor(
        0.5, beta_2_decay=-0.65, epsilon_1=1e-15, epsilon_2=1e-4, clip_threshold=0.9, relative_step="always"
    )
    x = keras.Variable(np.ones(10))
    first_and_last = [(0.55, 0.55), (0.3031, 0.3024), (0.1671, 0.1663), (0.0923, 0.0914), (0.0554, 0.0545)]
    gradients = [np.full(10, 0.01), *[np.arange(0.1, 1.1, 0.1)] * 4]
    for gradient, ends in zip(gradients, first_and_last, strict=True):
        optimizer.apply([keras.ops.convert_to_tensor(gradient, dtype="float32")], [x])
        np.testing.assert_allclose(keras.ops.convert_to_numpy(x)[[0, -1]], ends, rtol=5e-4, atol=5e-4)
