"""The Keras pages on the backends that tests/docs does not run them on, and the numbers in their tables."""

import re

import keras
import pages
import pytest

PAGES = [
    page for page in pages.RUN if re.search(r"^(?:import keras|from adafactor\.keras)", page.read_text(), re.MULTILINE)
]


@pytest.mark.backend("tensorflow", "torch", reason="tests/docs runs every page on JAX")
@pytest.mark.parametrize("page", PAGES, ids=pages.name)
def test_every_block_runs(page, tmp_path):
    assert keras.backend.backend() in ("tensorflow", "torch")
    pages.run(page, tmp_path)


@pytest.mark.once
def test_the_table_of_kept_numbers_is_right():
    from adafactor import layout

    rows = re.findall(
        r"^\| \(([\d, ]+)\), [^|]*\|([^|]*)\|([^|]*)\|([^|]*)\|$", (pages.ROOT / "docs/keras.md").read_text(), re.M
    )
    assert len(rows) == 3
    for shape, *kept in rows:
        shape = tuple(int(n) for n in shape.split(","))
        policies = ("last_two", "largest_two", "smallest")
        assert [layout(shape, policy).state_size for policy in policies] == [int(n.replace(",", "")) for n in kept]
