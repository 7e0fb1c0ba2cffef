"""`adafactor` without a command: what it says, and what it does not import for that."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from adafactor import __version__
from adafactor.cli.command import python


def test_help_and_version_need_no_framework(tmp_path: Path) -> None:
    program = (
        "import sys; from adafactor.cli import main\n"
        "def left():\n"
        "    try: main(ARGUMENTS)\n"
        "    except SystemExit as end: assert end.code == 0\n"
        "left()\n"
        "heavy = {'keras', 'jax', 'torch', 'tensorflow', 'matplotlib'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    for arguments, words in (([], "commands:"), (["--version"], __version__), (["plan", "--help"], "MODEL")):
        code = program.replace("ARGUMENTS", repr(arguments))
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert words in done.stdout


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no device that is always full")
def test_output_that_cannot_be_written_ends_in_one_sentence() -> None:
    command = [sys.executable, "-m", "adafactor.cli", "plan", "8x8"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
    assert "No space left" in done.stderr
    done = subprocess.run(f"{' '.join(command)} >&-", shell=True, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    reading = f"{' '.join(command)} --top 0 | true; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", reading], stderr=subprocess.PIPE, text=True)
    assert done.returncode in (0, 1)  # 0 where all was written before its reader left
    assert done.stderr == ""


def test_a_process_of_its_own_imports_nothing_from_the_current_folder(tmp_path: Path) -> None:
    (tmp_path / "numpy.py").write_text("raise RuntimeError('not this one')")
    done = subprocess.run(python("import numpy; print(numpy.pi)"), capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout.startswith("3.14"), done.stderr
