"""What needs a CUDA device, to its end on a mocked one: no name is missing and no tensor is on the wrong side."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
ROOT = Path(__file__).parents[3]
PATH = {"PYTHONPATH": f"{ROOT / 'tests/helpers'}", "PATH": "/usr/bin:/bin", "COLUMNS": "1000"}


def test_the_benchmark(tmp_path):
    """Without PYTHONPATH, and with every row in the file."""
    rows = tmp_path / "rows.jsonl"
    command = [sys.executable, ROOT / "tests/helpers/mocked_gpu.py", ROOT / "benchmarks/gpu.py", "--repeats", "2"]
    outcome = subprocess.run(
        [*command, "--json", rows],
        capture_output=True,
        text=True,
        env={"PATH": PATH["PATH"]},
        cwd=tmp_path,
        check=False,
    )
    assert outcome.returncode == 0, outcome.stdout[-2000:] + outcome.stderr[-3000:]
    found = [json.loads(line) for line in rows.read_text().splitlines()]
    assert [row["check"] for row in found if "check" in row][:2] == [
        "launches, Llama 7B layer", "launches, 1,000 LoRA matrices",
    ]  # fmt: skip
    assert {row["mix"] for row in found if "mix" in row} == {"Llama 7B layer", "GPT-2 small", "1,000 LoRA matrices"}
    assert sum("host" in row for row in found) == 6


def test_the_tests_of_a_device(tmp_path):
    """They pass or fail by what is computed, which nothing is here: an error of any other kind is one of theirs."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "mocked_gpu", "-p", "no:cacheprovider"]
    outcome = subprocess.run(
        [*command, ROOT / "tests/engine/torch/test_gpu.py"],
        capture_output=True, text=True, env=PATH, cwd=ROOT, check=False,
    )  # fmt: skip
    *_, last = outcome.stdout.splitlines()
    assert "passed" in last, outcome.stdout[-3000:] + outcome.stderr[-2000:]
    assert "skipped" not in last
    assert "error" not in last
    failed = [line for line in outcome.stdout.splitlines() if line.startswith("FAILED")]
    assert all(" - assert" in line or " - AssertionError" in line for line in failed), "\n".join(failed)
