"""docs/planning.md shows what the command prints."""

import re
import shlex
from pathlib import Path

from adafactor.cli import main
from adafactor.planning.files import SUFFIXES, folder

PAGE = (Path(__file__).parents[2] / "docs" / "planning.md").read_text()


def test_the_table_is_what_its_command_prints(capsys):
    ((command, shown),) = re.findall(r"^```\n\$ adafactor ([^\n]*)\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
    assert main(shlex.split(command)) == 0
    assert capsys.readouterr().out.strip() == shown.strip()


def test_every_kind_of_file_is_there():
    rows = PAGE.split("| MODEL |")[1].split("\n\n")[0]
    assert all(suffix in rows for suffix in SUFFIXES if suffix != ".index.json")
    assert "pytorch_model.bin" in folder.NAMES
