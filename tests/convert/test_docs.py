"""What docs/state.md shows runs, and its lists are complete."""

import re
from pathlib import Path

from adafactor.convert import NAMES
from adafactor.convert.names import check

PAGE = (Path(__file__).parents[2] / "docs" / "state.md").read_text()


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)


def test_every_block_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (block,) = blocks("python")
    exec(block, {"__name__": "docs"})
    assert "2 parameters: as they were" in capsys.readouterr().out


def test_the_names_file_is_one():
    import json

    (block,) = blocks("json")
    check(json.loads(block))


def test_every_format_is_listed():
    table = PAGE.split("| format |")[1].split("\n\n")[0]
    assert set(re.findall(r"`([\w.]+)`", "".join(row.split("|")[1] for row in table.splitlines()[2:]))) == set(NAMES)
