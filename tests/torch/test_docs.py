"""Every Python block of docs/torch.md runs, in order, in one session."""

import re
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "torch.md"


def test_every_block_runs():
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.DOTALL | re.MULTILINE)
    assert len(blocks) >= 7
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
