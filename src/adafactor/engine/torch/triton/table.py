"""The tables of the Triton kernels: which program works on which part of which tensor. NumPy alone, no device.

Everything follows from the tensors' canonical forms (``canonical.py``), and is made once for a list of tensors.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from adafactor.core.canonical import Canonical
from adafactor.core.factoring import Cut
from adafactor.engine.torch.int8 import BLOCK as INT8_BLOCK

#: int64 fields of a tensor's record: addresses; what a user has said; the form; where its share of a buffer begins.
FIELDS = (
    *("param", "first", "second", "momentum", "scales", "residual", "diagnostics"),
    *("step", "lr", "flags", "seed", "rng_stream"),
    *("n", "inner", "m", "matrices", "per_slice", "slices", "slice_size", "size", "parts", "part_rows", "chunks"),
    # of what other processes hold parts of
    *("global_rows", "global_columns", "global_size", "row_offset", "column_offset"),
    *("sums", "finished", "root_mu", "slice", "tiles", "partial", "squares", "moved", "row_parts", "row_totals"),
)
#: Buffers, and the fields that say where a tensor's share of one begins. ``partials`` are three numbers each.
OFFSETS = {
    "sums": ("sums", "finished", "row_parts", "row_totals"),
    "partials": ("partial",),
    "squares": ("squares",),
    "roots": ("root_mu",),
    "slices": ("slice",),
}
#: float64 numbers of a tensor.
NUMBERS = ("exponent", "least", "eps1", "eps2", "clip", "decays", "beta1")
NO_CLIP = 2.0**127  # beyond any root mean square of float32 numbers
FLAGS = ("caps", "scale", "after_decay", "maximize", "skip")
BLOCK_FIELDS = ("tensor", "a", "b", "c", "d")  # what a to d are, each kernel says
SLICE_FIELDS = ("tensor", "k_begin", "k_end", "p_begin", "p_end", "q_begin", "q_end")

TILE = 4096  # elements that 8 warps work on at a time
WIDEST = 16384  # columns up to which a row's sum and the column sums of its part stay in registers
FLAT = 16384  # elements of one program over an unfactored tensor, FLAT_TILE at a time
FLAT_TILE = 1024
ON_CHIP = 16384  # elements of a tensor that one program steps, with g in its registers
TRANSPOSED = 32  # columns of a tile whose rows are neighbours in memory: the rest of its elements are neighbours
COLUMNS = 128  # of one tile where the sums over parts are added up
# S and W of a part of R rows take 8 bytes per column, and are written and read once: 16 / R bytes per element. Rows are
# as many as leave every launch two programs for each place of 132 multiprocessors with 16 warps each, within bounds.
PART_ROWS = (512, 32)
WARPS = 2 * 132 * 16
SHARED = 64 * 1024
REGISTERS = 128  # of a thread of the measuring programs: two of 8 warps, or one of 16, fill a multiprocessor


class Tile(NamedTuple):
    """The tile of a factored tensor: K matrices × NP rows × M columns, and the warps that share it.

    ``wide``: it does not hold whole rows, so their sums are taken first.
    """

    K: int
    NP: int
    M: int
    warps: int
    wide: bool

    def of_apply(self, half: bool) -> Tile:
        """The tile of the second pass, which needs no whole rows; half as large where registers are short."""
        size = min(TILE, self.K * self.NP * self.M)
        size = max(size // 2, INT8_BLOCK) if half else size
        if size == self.K * self.NP * self.M:
            return self._replace(wide=False)
        M = min(self.M, size)
        return Tile(1, size // M, M, 8, False)

    def stages(self, shared: int, *itemsizes: int) -> int:
        """How many tiles of tensors of these item sizes are on their way at a time, 3 at most.

        All but one of them wait in shared memory, ``shared`` bytes of which the device gives a program; 64 KB leave
        room for a second program. Rows of a few elements do not get there in wide words, and their addresses fill the
        registers.
        """
        if self.M < 16:
            return 1
        size = self.K * self.NP * self.M * sum(itemsizes)
        if self.M > 2 * TILE:  # one program fills a multiprocessor
            return 2 if size + 1024 <= shared else 1
        return max(1, min(3, 1 + SHARED // size))


class Launch(NamedTuple):
    """What the programs of one launch have in common; dtypes by name, ``momentum`` "" for none."""

    tile: Tile | None  # None: an unfactored tensor
    param: str
    grad: str
    momentum: str
    scale: bool
    stochastic: bool
    compensated: bool
    huge: bool
    aligned: bool
    flat: bool  # apply walks elements, not rows
    sliced: bool
    cut: Cut | None  # what a part lacks: its columns are finished with those of the same cut; None if it is whole
    transposed: bool  # rows are neighbours in memory, not columns
    on_chip: bool = False  # one program makes the whole step of a tensor

    @property
    def part(self) -> bool:
        """Whether other processes hold the rest of the parameter."""
        return self.cut is not None

    @property
    def halves(self) -> bool:
        """Whether apply takes half a tile: for the work on 8-bit momentum, and for addresses of rows and columns."""
        return self.momentum == "int8" or self.transposed

    @property
    def of_apply(self) -> Launch:
        """What the programs of apply have in common: those of several widths share tiles."""
        cut: Cut | None = "rows" if self.part else None
        if self.tile is None:
            return self._replace(scale=False, cut=cut)
        tile = Tile(1, 1, FLAT_TILE, 4, True) if self.flat else self.tile.of_apply(self.halves)
        return self._replace(tile=tile, scale=False, cut=cut)

    @property
    def keeps_squares(self) -> bool:
        """Whether apply leaves the sums of x² (eq. 6) where measure would: its programs are cut along slices."""
        return self.on_chip or not (self.flat and (self.tile is not None or self.sliced))


@dataclass
class Tensor:
    """What the tables must know of one tensor; its rows are those that measure finishes."""

    form: Canonical
    launch: Launch


@dataclass
class Tables:
    """The records of a list of tensors and the blocks of every launch.

    Attributes:
        records: int64 (tensors, FIELDS); addresses and what a user has said are still 0.
        slices: int64 (slices, SLICE_FIELDS).
        measure, apply: per launch its blocks, int64 (programs, BLOCK_FIELDS). Apply walks them backwards: what measure
            read last is still in the cache.
        on_chip: likewise, of tensors that are in no other table.
        members: per launch of measure, or on chip, its tensors.
        columns: per (K, P, C) of the tile and ``cut`` its blocks.
        sizes: numbers in each buffer of ``OFFSETS``.
    """

    records: NDArray[np.int64]
    slices: NDArray[np.int64]
    measure: dict[Launch, NDArray[np.int64]] = field(default_factory=dict)
    apply: dict[Launch, NDArray[np.int64]] = field(default_factory=dict)
    on_chip: dict[Launch, NDArray[np.int64]] = field(default_factory=dict)
    members: dict[Launch, list[int]] = field(default_factory=dict)
    columns: dict[tuple[int, int, int, Cut | None], NDArray[np.int64]] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=lambda: dict.fromkeys(OFFSETS, 0))


def power(n: int, base: int = 2) -> int:
    """The least power of ``base`` that is at least n."""
    result = 1
    while result < n:
        result *= base
    return result


def _width(m: int, coarse: int) -> int:
    """Columns of a tile for m columns: a power of two, and of four up to ``coarse``."""
    return max(4, power(m, 4) if m <= coarse else power(m))


def tile_of(form: Canonical, whole_rows: bool = True, transposed: bool = False) -> Tile:
    """The tile of a factored tensor. Few different ones, for each is a launch and a compilation.

    ``whole_rows``: whether they are on this process. ``transposed``: as `Launch` has it.
    """
    matrices = form.outer * form.inner
    if transposed:
        M = min(_width(form.columns, TILE // 4), TRANSPOSED)
        return Tile(1, TILE // M, M, 8, True)
    wide = form.columns > WIDEST or not whole_rows
    M = TILE if form.columns > WIDEST else _width(form.columns, TILE // 4)
    rows = max((TILE if M >= 16 else TILE // 4) // M, 1)  # addresses of short rows fill the registers
    warps = max(4, min(16, max(TILE, M) // 512))
    if matrices == 1 or form.rows >= rows or not whole_rows:
        return Tile(1, rows, M, warps, wide)
    NP = min(power(form.rows, 4), rows)
    return Tile(rows // NP, NP, M, warps, wide)


def on_chip(form: Canonical, coded: bool) -> Tile | None:
    """The tile of a whole tensor that one program can hold; of an unfactored one it is one row.

    ``coded``: with 8-bit momentum, whose blocks of 256 neighbours must be neighbours in the tile.
    """
    if form.slices > 1 or form.outer * form.inner > 1 or (coded and ON_CHIP // 4 < INT8_BLOCK):
        return None
    if form.factored:
        M = max(4, power(form.columns, 4))
        fits = M <= ON_CHIP and form.rows <= ON_CHIP // M
        whole = not coded or form.columns % INT8_BLOCK == 0 or form.columns == M
        return Tile(1, ON_CHIP // M, M, 16, False) if fits and whole else None
    size = ON_CHIP // 4 if form.size <= ON_CHIP // 4 else ON_CHIP // 2  # its statistic fills as many registers as g
    return Tile(1, 1, size, max(4, size // 512), False) if form.size <= size else None


@dataclass
class _Kind:
    """What tensors of one form and launch have in common: tables of one of them, numbered 0, which begin at 0."""

    record: dict[str, int]
    measure: NDArray[np.int64]
    apply: NDArray[np.int64]
    slices: NDArray[np.int64]
    sizes: dict[str, int]
    columns: tuple[tuple[int, int, int], NDArray[np.int64]] | None = None


def tables(tensors: Sequence[Tensor]) -> Tables:
    """Cut every tensor into the work of programs, and give it its place in the buffers."""
    kinds: dict[tuple[Canonical, Launch], list[int]] = {}
    for number, tensor in enumerate(tensors):
        kinds.setdefault((tensor.form, tensor.launch), []).append(number)
    part_rows = _part_rows(kinds)
    result = Tables(np.zeros((len(tensors), len(FIELDS)), np.int64), np.zeros((0, len(SLICE_FIELDS)), np.int64))
    lists: tuple[dict[Any, list[NDArray[np.int64]]], ...] = tuple(defaultdict(list) for _ in range(4))
    measured, applied, held, summed = lists
    slices = [result.slices]
    for (form, launch), members in kinds.items():
        kind = _on_chip_kind(form) if launch.on_chip else _kind(form, launch, part_rows.get(launch, 0))
        numbers, count = np.array(members), len(members)
        result.records[numbers] = [kind.record[name] for name in FIELDS]
        result.members.setdefault(launch, []).extend(members)

        def every(blocks: NDArray[np.int64], numbers: NDArray[np.int64] = numbers) -> NDArray[np.int64]:
            copies = np.tile(blocks, (len(numbers), 1))
            copies[:, 0] = np.repeat(numbers, len(blocks))
            return copies

        for buffer, size in kind.sizes.items():
            for name in OFFSETS[buffer]:
                result.records[numbers, FIELDS.index(name)] += result.sizes[buffer] + size * np.arange(count)
            result.sizes[buffer] += count * size
        if launch.on_chip:
            held[launch].append(every(kind.measure))
            continue
        measured[launch].append(every(kind.measure))
        applied[launch.of_apply].append(every(kind.apply))
        slices.append(every(kind.slices))
        if kind.columns is not None:
            summed[*kind.columns[0], launch.cut].append(every(kind.columns[1]))
    result.slices = np.concatenate(slices)
    result.on_chip, result.measure, result.columns = (
        {key: np.concatenate(blocks) for key, blocks in table.items()} for table in (held, measured, summed)
    )
    result.apply = {launch: np.concatenate(blocks)[::-1].copy() for launch, blocks in reversed(applied.items())}
    return result


def _record(form: Canonical) -> dict[str, int]:
    record = dict.fromkeys(FIELDS, 0)
    record.update(n=form.rows, inner=form.inner, m=form.columns, matrices=form.outer * form.inner, size=form.size)
    record.update(slices=form.slices, slice_size=form.size // form.slices, tiles=1, moved=1)
    record.update(global_rows=form.rows, global_columns=form.columns, global_size=record["slice_size"])
    return record


def _on_chip_kind(form: Canonical) -> _Kind:
    """One program; no slice is anybody else's."""
    record, program = _record(form) | {"slices": 0}, _blocks(np.zeros(1, np.int64))
    return _Kind(record, program, program[:0], np.zeros((0, len(SLICE_FIELDS)), np.int64), {"squares": 1})


def _kind(form: Canonical, launch: Launch, part_rows: int) -> _Kind:
    record = _record(form)
    runs = _runs(form)
    if launch.tile is None:
        blocks, entries = _flat(form)
        sizes = {"partials": len(blocks), "squares": len(blocks), "slices": form.slices}
        return _Kind(record, blocks, runs, entries, sizes)
    moves = launch.tile.of_apply(launch.halves and not launch.flat)
    sums = _add_parts(record, form, launch.tile, part_rows)
    record["moved"] = -(-form.columns // moves.M)
    key, columns, ends = _columns(form, record, one_matrix=launch.part)
    moved = runs if launch.flat else _parts(record, moves)
    sizes = {
        "sums": -(-sums // 16) * 16,  # as far apart as wide loads need
        "partials": len(columns),
        "squares": record["matrices"] * record["parts"] * record["moved"],
        "roots": record["matrices"],
        "slices": form.slices,
    }
    entries = _factored_slices(form, record, ends)
    return _Kind(record, _parts(record, launch.tile), moved, entries, sizes, (key, columns))


def _part_rows(kinds: Mapping[tuple[Canonical, Launch], Sequence[int]]) -> dict[Launch, int]:
    """Rows of a part, for the tensors of each launch."""
    rows_of_part: dict[Launch, int] = {}
    by_launch: dict[Launch, list[tuple[int, int]]] = {}
    for (form, launch), members in kinds.items():
        if launch.tile is not None and not launch.on_chip:
            matrices = len(members) * -(-form.outer * form.inner // launch.tile.K)
            by_launch.setdefault(launch, []).append((matrices, form.rows))
    for launch, sizes in by_launch.items():
        tile = launch.tile
        assert tile is not None
        matrices, rows_of = np.array(sizes).T
        rows, least = max(PART_ROWS[0], tile.NP), max(PART_ROWS[1], tile.NP, 4 * TILE // tile.M)
        while rows > least and tile.warps * (matrices * -(-rows_of // rows)).sum() < WARPS:
            rows //= 2
        rows_of_part[launch] = -(-rows // tile.NP) * tile.NP
    return rows_of_part


def _add_parts(record: dict[str, int], form: Canonical, tile: Tile, part_rows: int) -> int:
    """The parts of a factored tensor, and the numbers that its sums take."""
    matrices = form.outer * form.inner
    part_rows = min(part_rows, -(-form.rows // tile.NP) * tile.NP)
    parts = -(-form.rows // part_rows)
    chunks = -(-form.columns // tile.M)
    record.update(per_slice=matrices // form.slices, parts=parts, part_rows=part_rows, chunks=chunks)
    record["tiles"] = -(-form.columns // COLUMNS)
    runs = form.outer * form.rows * form.inner
    record["finished"] = 2 * matrices * parts * form.columns
    record["row_parts"] = record["finished"] + runs
    record["row_totals"] = record["row_parts"] + (runs * chunks if tile.wide else 0)
    return record["row_totals"] + (runs if tile.wide else 0)


def _grid(*axes: NDArray[np.int64]) -> list[NDArray[np.int64]]:
    """All combinations, the last axis changing fastest."""
    return [values.ravel() for values in np.meshgrid(*axes, indexing="ij")]


def _blocks(*values: Any) -> NDArray[np.int64]:
    result = np.zeros((len(values[0]), len(BLOCK_FIELDS)), np.int64)
    for column, value in enumerate(values, start=1):
        result[:, column] = value
    return result


def _parts(record: dict[str, int], tile: Tile) -> NDArray[np.int64]:
    """tensor, first matrix, part, chunk of columns."""
    matrices = np.arange(0, record["matrices"], tile.K)
    chunks = np.arange(-(-record["m"] // tile.M))
    return _blocks(*_grid(matrices, np.arange(record["parts"]), chunks))


def _columns(
    form: Canonical, record: dict[str, int], one_matrix: bool
) -> tuple[tuple[int, int, int], NDArray[np.int64], NDArray[np.int64]]:
    """tensor, first matrix, tile, end of the matrices, place of the partial sums; and where each slice's end.

    With one tile per matrix a program takes several matrices, all of one slice, unless it shall be ``one_matrix``.
    """
    tiles, per_slice = record["tiles"], record["per_slice"]
    if tiles > 1 or one_matrix:
        matrix, tile = _grid(np.arange(record["matrices"]), np.arange(tiles))
        blocks = _blocks(matrix, tile, matrix + 1, np.arange(len(matrix)))
        return (1, 8, COLUMNS), blocks, np.arange(form.slices + 1) * per_slice * tiles
    C = COLUMNS if per_slice == 1 else _width(form.columns, COLUMNS // 2)  # single matrices share one launch
    K = 1 if per_slice == 1 else max(1, 1024 // C)
    slice_, first = _grid(np.arange(form.slices), np.arange(0, per_slice, K))
    end = np.minimum(first + K, per_slice) + slice_ * per_slice
    blocks = _blocks(first + slice_ * per_slice, 0, end, np.arange(len(first)))
    return (K, 8 if K == 1 else 1, C), blocks, np.arange(form.slices + 1) * (len(first) // form.slices)


def _factored_slices(form: Canonical, record: dict[str, int], ends: NDArray[np.int64]) -> NDArray[np.int64]:
    k = np.arange(form.slices + 1) * record["per_slice"]
    q = k * record["parts"] * record["moved"]
    return np.stack([np.zeros(form.slices, np.int64), k[:-1], k[1:], ends[:-1], ends[1:], q[:-1], q[1:]], axis=1)


def _flat(form: Canonical) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """tensor, first element, end, place of the sums; and the slices."""
    size = form.size // form.slices
    slice_, start = _grid(np.arange(form.slices), np.arange(0, size, FLAT))
    end = np.minimum(start + FLAT, size)
    index = np.arange(len(start))
    p = np.arange(form.slices + 1) * (len(start) // form.slices)
    zeros = np.zeros(form.slices, np.int64)
    entries = np.stack([np.zeros(form.slices, np.int64), zeros, zeros, p[:-1], p[1:], p[:-1], p[1:]], axis=1)
    return _blocks(start + slice_ * size, end + slice_ * size, index), entries


def _runs(form: Canonical) -> NDArray[np.int64]:
    """tensor, first element, end, place of the sum of x²: whole blocks of 8-bit momentum, whatever the slices."""
    assert FLAT % INT8_BLOCK == 0
    start = np.arange(0, form.size, FLAT)
    return _blocks(start, start + FLAT, np.arange(len(start)))
