"""What docs/state.md shows runs, and its lists are complete."""

import json
import re

import pages

from adafactor.convert import NAMES
from adafactor.convert.names import check

PAGE = pages.ROOT / "docs" / "state.md"


def test_the_page_prints_what_was_converted(tmp_path, capsys):
    pages.run(PAGE, tmp_path)
    assert "2 parameters: as they were" in capsys.readouterr().out


def test_the_names_file_is_one():
    (block,) = pages.blocks(PAGE, "json")
    check(json.loads(block))


def test_every_format_is_listed():
    table = PAGE.read_text().split("| format |")[1].split("\n\n")[0]
    assert set(re.findall(r"`([\w.]+)`", "".join(row.split("|")[1] for row in table.splitlines()[2:]))) == set(NAMES)
