"""Every Python block of docs/torch.md and docs/low-precision.md runs, in order, in one session per page."""

import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[2] / "docs"
PAGE = DOCS / "torch.md"


@pytest.mark.parametrize(("page", "least"), [("torch.md", 7), ("low-precision.md", 3)])
def test_every_block_runs(page, least):
    blocks = re.findall(r"^```python\n(.*?)^```", (DOCS / page).read_text(), re.DOTALL | re.MULTILINE)
    assert len(blocks) >= least
    exec("\n".join(blocks), {"__name__": "docs"})


def test_the_table_of_arguments_is_the_signature():
    import inspect

    from adafactor.torch import Adafactor

    table = PAGE.read_text().split("## Arguments")[1].split("##")[0]
    rows = dict(re.findall(r"^\| `(\w+)` \| `(.*?)` \|", table, re.MULTILINE))
    arguments = list(inspect.signature(Adafactor).parameters.values())[1:]
    assert {a.name for a in arguments} == rows.keys()
    for argument in arguments:
        assert eval(rows[argument.name]) == argument.default
