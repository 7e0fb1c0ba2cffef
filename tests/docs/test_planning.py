"""docs/planning.md shows what the command prints."""

import re
import shlex
from pathlib import Path

from adafactor.cli import main
from adafactor.planning.files import NAMES, SUFFIXES

PAGE = (Path(__file__).parents[2] / "docs" / "planning.md").read_text()


def test_the_tables_are_what_their_commands_print(capsys):
    blocks = re.findall(r"^```\n\$ adafactor ([^\n]*)\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
    assert len(blocks) == 2
    for command, shown in blocks:
        assert main(shlex.split(command)) == 0
        printed = capsys.readouterr().out.strip()
        if shown.startswith("..."):
            assert shown.removeprefix("...").strip() in printed
        else:
            assert printed == shown.strip()


def test_every_kind_of_file_is_there():
    rows = PAGE.split("| MODEL |")[1].split("\n\n")[0]
    assert all(suffix in rows for suffix in SUFFIXES if suffix != ".index.json")
    assert "pytorch_model.bin" in NAMES
