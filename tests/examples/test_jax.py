"""The JAX examples run and end well."""

import os
import re
import subprocess
import sys
from pathlib import Path

import needed
import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("program", "said"),
    [
        (["flax_nnx.py", "--steps", "60"], r"step +60  loss [123]\."),
        (["jax_sharded.py"], r"optimizer: 1\n(.*\n)+.*: 1\n"),
    ],
)
def test_examples(program, said):
    if "flax" in program[0]:
        needed.packages("flax")
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    command = [sys.executable, ROOT / "examples" / program[0], *program[1:]]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert re.search(said, done.stdout), done.stdout
