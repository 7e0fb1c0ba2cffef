"""A training process killed again and again ends where an undisturbed one does; see ``kill_single.py``."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

HARNESS = Path(__file__).parents[1] / "helpers" / "kill_single.py"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the harness forks")
@pytest.mark.parametrize("framework", ["torch", "jax", "keras", "tensorflow"])
def test_killed_and_resumed(framework, times):
    command = [sys.executable, str(HARNESS), "--framework", framework, "--times", str(3 * times)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300 * times)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert "0 runs lost, 0 differences" in done.stdout
