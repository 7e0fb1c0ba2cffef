"""Random edits between steps end in right steps or refusals, under AddressSanitizer where it can be had."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HELPERS = Path(__file__).parents[1] / "helpers"
ROOT = Path(__file__).parents[2]


def fuzz(edits, seed, environment):
    done = subprocess.run(
        [sys.executable, "-X", "faulthandler", HELPERS / "edit_fuzz.py", f"--edits={edits}", f"--seed={seed}"],
        env={**os.environ, **environment}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, f"{done.stdout[-2000:]}{done.stderr[-6000:]}"
    assert "AddressSanitizer" not in done.stderr
    right, refused = (int(word) for word in done.stdout.split("right")[-1].split(", refused"))
    assert right
    assert refused
    assert right + refused == edits


def test_edits_between_steps(times):
    fuzz(150 * times, times, {})


def test_edits_under_address_sanitizer(times, tmp_path):
    """``ADAFACTOR_SANITIZED``: a library built with ``-DADAFACTOR_SANITIZE=address``; else it is built where asked."""
    library = os.environ.get("ADAFACTOR_SANITIZED")
    if library is None and times == 1:
        pytest.skip("building takes minutes: --times 2, or ADAFACTOR_SANITIZED names a library")
    if shutil.which("gcc") is None:
        pytest.skip("no gcc, whose libasan is preloaded")
    if library is None:
        if shutil.which("cmake") is None:
            pytest.skip("no cmake")
        options = ["-DADAFACTOR_SANITIZE=address", "-DCMAKE_BUILD_TYPE=RelWithDebInfo", "-DCMAKE_CXX_COMPILER=g++"]
        subprocess.run(["cmake", "-S", ROOT, "-B", tmp_path, *options], check=True, capture_output=True)
        subprocess.run(["cmake", "--build", tmp_path], check=True, capture_output=True)
        library = str(next(tmp_path.glob("libadafactor.so")))
    found = subprocess.run(["gcc", "-print-file-name=libasan.so"], capture_output=True, text=True, check=True)
    preload = found.stdout.strip()
    if not Path(preload).is_absolute():
        pytest.skip("gcc has no libasan")
    options = "detect_leaks=0:allocator_may_return_null=1"
    preload += (
        " "
        + subprocess.run(
            ["gcc", "-print-file-name=libstdc++.so.6"], capture_output=True, text=True, check=True
        ).stdout.strip()
    )  # whose exceptions it intercepts
    fuzz(100 * times, times, {"ADAFACTOR_LIBRARY": library, "LD_PRELOAD": preload, "ASAN_OPTIONS": options})
