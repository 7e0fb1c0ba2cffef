"""The tables of the Triton kernels: every element is some program's, once, and the buffers are small."""

import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from trajectories import LAYOUTS
from triton_support import SMALL

from adafactor import layout
from adafactor.core.canonical import canonical
from adafactor.engine.torch.triton import table

LLAMA_LAYER = [(4096, 4096)] * 4 + [(11008, 4096)] * 2 + [(4096, 11008)] + [(4096,)] * 2


def described(shape, factoring="last_two", flat=False):
    form = canonical(layout(shape, factoring))
    if form is None:
        return None
    tile = table.tile_of(form) if form.factored else None
    launch = table.Launch(
        tile, "float32", "float32", "", True, False, False, False, False, flat or not tile, False, None, False
    )
    return table.Tensor(form, launch)


def visits(tables, number, blocks, tile):
    """How often each element of a tensor is visited."""
    r = dict(zip(table.FIELDS, tables.records[number], strict=True))
    seen = np.zeros(r["size"], np.int64)
    for tensor, a, b, c, _ in blocks:
        if tensor != number:
            continue
        if tile is None:
            seen[a : min(b, r["size"])] += 1
            continue
        for k in range(a, min(a + tile.K, r["matrices"])):
            for i in range(b * r["part_rows"], min((b + 1) * r["part_rows"], r["n"])):
                run = (k // r["inner"] * r["n"] + i) * r["inner"] + k % r["inner"]
                seen[run * r["m"] + c * tile.M : run * r["m"] + min((c + 1) * tile.M, r["m"])] += 1
    return seen


@pytest.mark.parametrize("small", [True, False])
def test_every_element_is_visited_once_in_each_pass(small, monkeypatch):
    if small:
        for name, value in SMALL.items():
            monkeypatch.setattr(table, name, value)
    cases = [((2, 3, 4, 5), factoring) for factoring in LAYOUTS.values()]
    cases += [(shape, "last_two") for shape in [(), (3,), (5000,), (40, 70), (3, 600), (600, 3), (9, 40, 3, 3)]]
    tensors = [described(*case, flat=flat) for case in cases for flat in (False, True)]
    tensors = [tensor for tensor in tensors if tensor is not None]
    tables = table.tables(tensors)
    assert sum(map(len, tables.measure.values())) > len(tensors)
    for number, tensor in enumerate(tensors):
        tile, launch = tensor.launch.tile, tensor.launch
        assert (visits(tables, number, tables.measure[launch], tile) == 1).all()
        moved = None if launch.flat else tile.of_apply(False)
        assert (visits(tables, number, tables.apply[launch.of_apply], moved) == 1).all()
        columns = sum(int((blocks[:, 0] == number).sum()) for blocks in tables.columns.values())
        assert (columns > 0) == tensor.form.factored
    assert len(tables.slices) == sum(tensor.form.slices for tensor in tensors)


def test_what_a_block_of_8_bit_momentum_holds_is_one_programs():
    tables = table.tables([described((77, 999), flat=True)])
    (blocks,) = tables.apply.values()
    assert (blocks[:, 1:3] % 256 == 0).all()


def test_the_buffers_of_a_model_that_fills_a_device():
    layers = 16
    sizes = table.tables([described(shape) for shape in LLAMA_LAYER * layers]).sizes
    size = 4 * layers * sum(map(math.prod, LLAMA_LAYER))
    buffers = 4 * (sizes["sums"] + 3 * sizes["partials"] + sizes["squares"] + sizes["roots"])
    assert 0.002 * size < buffers < 0.0075 * size


def test_every_launch_is_cut_so_that_it_fills_a_device():
    tables = table.tables([described(shape) for shape in LLAMA_LAYER])
    rows = {launch.tile.M: tables.records[numbers[0]][table.FIELDS.index("part_rows")]
            for launch, numbers in tables.members.items() if launch.tile}  # fmt: skip
    assert rows == {4096: 64, 16384: 32}
    (alone,) = table.tables([described((4096, 4096))]).measure.values()
    assert len(alone) == 128


@pytest.mark.parametrize(
    ("shape", "tile"),
    [((16, 1024), (16, 1024)), ((1024, 16), (1024, 16)), ((100, 100), None), ((5, 3), (4096, 4)),
     ((64, 256), (64, 256)), ((65, 252), None), ((1, 16385), None), ((7,), (1, 4096)), ((4097,), (1, 8192)),
     ((8193,), None), ((2, 3, 3), None), ((), (1, 4096))],
    ids=str,
)  # fmt: skip
def test_what_one_program_holds(shape, tile):
    form = canonical(layout(shape))
    found = table.on_chip(form, coded=False)
    assert (found and (found.NP, found.M)) == tile
    blocks_of_neighbours = tile is not None and (len(shape) < 2 or shape[1] % 256 == 0 or shape[1] == tile[1])
    assert (table.on_chip(form, coded=True) == found) is (tile is None or blocks_of_neighbours)
    if found:
        launch = table.Launch(
            found,
            "float32",
            "float32",
            "",
            True,
            False,
            False,
            False,
            False,
            not form.factored,
            False,
            None,
            False,
            True,
        )
        tables = table.tables([table.Tensor(form, launch)] * 3)
        (blocks,) = tables.on_chip.values()
        assert blocks[:, 0].tolist() == [0, 1, 2]
        assert not any(map(len, (tables.measure, tables.apply, tables.columns, tables.slices)))
        assert (tables.sizes["sums"], tables.sizes["squares"]) == (0, 3)


def test_a_thousand_matrices_are_as_many_launches_as_two():
    few, many = (table.tables([described(s) for s in [(16, 1024), (1024, 16)] * n]) for n in (1, 500))
    for name in ("measure", "apply", "columns"):
        assert getattr(few, name).keys() == getattr(many, name).keys()


def test_offsets_beyond_four_billion_elements():
    tables = table.tables([described((70000, 70000)), described((5, 5))])
    assert tables.records.dtype == np.int64
    assert tables.records[0][table.FIELDS.index("size")] == 70000**2
    assert torch.from_numpy(tables.records).dtype == torch.int64


def test_importing_the_front_end_does_not_import_triton():
    code = "import sys; import adafactor.torch; print('triton' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert found == ["False"]


def test_triton_before_it_had_knobs():
    helper = Path(__file__).parents[2] / "helpers" / "no_knobs.py"
    subprocess.run([sys.executable, str(helper)], check=True)
