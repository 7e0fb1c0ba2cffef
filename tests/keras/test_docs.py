"""The code in the README and on the Keras page runs as it stands."""

import re
from pathlib import Path

import keras
import pytest

ROOT = Path(__file__).parents[2]


def blocks(page):
    return re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text(), re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", ["README.md", "docs/keras.md", "docs/diagnostics.md"])
def test_every_block_of_a_page_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    old = keras.Sequential([keras.Input((16,)), keras.layers.Dense(32, activation="relu"), keras.layers.Dense(1)])
    old.compile(keras.optimizers.Adafactor(), "mse")
    old.optimizer.build(old.trainable_variables)
    old.save("old.keras")  # what the page loads
    found = blocks(page)
    assert len(found) >= 2
    names = {}
    for block in found:
        exec(block, names)  # a page is read from top to bottom


def test_the_table_of_kept_numbers_is_right():
    from adafactor import layout

    rows = re.findall(
        r"^\| \(([\d, ]+)\), [^|]*\|([^|]*)\|([^|]*)\|([^|]*)\|$", (ROOT / "docs/keras.md").read_text(), re.M
    )
    assert len(rows) == 3
    for shape, *kept in rows:
        shape = tuple(int(n) for n in shape.split(","))
        policies = ("last_two", "largest_two", "smallest")
        assert [layout(shape, policy).state_size for policy in policies] == [int(n.replace(",", "")) for n in kept]
