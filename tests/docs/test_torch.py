"""The table of arguments on docs/torch.md is the signature. tests/docs runs the page's code."""

import inspect
import re

import pages

from adafactor.torch import Adafactor


def test_the_table_of_arguments_is_the_signature():
    table = (pages.ROOT / "docs/torch.md").read_text().split("## Arguments")[1].split("##")[0]
    rows = dict(re.findall(r"^\| `(\w+)` \| `(.*?)` \|", table, re.MULTILINE))
    arguments = list(inspect.signature(Adafactor).parameters.values())[1:]
    assert {a.name for a in arguments} == rows.keys()
    for argument in arguments:
        assert eval(rows[argument.name]) == argument.default
