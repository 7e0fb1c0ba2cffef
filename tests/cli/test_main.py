"""`adafactor` without a command: what it says, and what it does not import for that."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from adafactor import __version__


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
