"""The one form in which the native kernels see a parameter: x[outer][rows][inner][columns] with contiguous columns.

Plain data, no array is touched. ``native/adafactor.h`` describes the form.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

from adafactor.core.factoring import Layout


class Canonical(NamedTuple):
    """A layout in the kernels' words.

    Attributes:
        outer, rows, inner, columns: a stack of outer × inner matrices. Not factored: outer slices of columns numbers.
        slices: how many clip factors and parameter scales; outer is a multiple of it.
        factored: whether there is a row and a column statistic.
        transposed: the layout's columns act as the kernel's rows and its rows as the kernel's columns. The step is the
            same (docs/algorithm.md, "Measure").
        columns_first: measure finishes the kernel's columns and adds up its rows: what a part needs whose columns are
            whole and whose rows are not. Only where inner is 1.
    """

    outer: int
    rows: int
    inner: int
    columns: int
    slices: int
    factored: bool
    transposed: bool = False
    columns_first: bool = False

    @property
    def size(self) -> int:
        return self.outer * self.rows * self.inner * self.columns

    @property
    def finished_size(self) -> int:
        """Numbers in the statistic that measure finishes, the kernel's row unless ``columns_first``."""
        return self.outer * self.inner * (self.columns if self.columns_first else self.rows) if self.factored else 0

    @property
    def sums_size(self) -> int:
        """Numbers in each of S and W."""
        if not self.factored:
            return self.slices
        return self.outer * self.inner * (self.rows if self.columns_first else self.columns)

    @property
    def slots(self) -> tuple[str, str]:
        """Names of the statistics that the kernel takes as its row and its column ("" for none)."""
        if not self.factored:
            return "second_moment", ""
        return ("column", "row") if self.transposed else ("row", "column")


def canonical(layout: Layout) -> Canonical | None:
    """The kernels' form of a layout of a dense parameter in C order, or ``None`` where it has none.

    From outside in, a form exists for batch axes, stack, one side of the matrix, stack, the other side, where each
    may be missing or span several axes, and axes of size 1 may stand anywhere. There is none for an interleaved
    side, a stack inside the matrix's inner side, or batch axes that do not lead.
    """
    slices = math.prod(layout.shape[axis] for axis in layout.batch)
    length = math.prod(layout.shape[axis] for axis in layout.whole)  # of a slice, as far as it is here
    axes = [axis for axis, size in enumerate(layout.shape) if size != 1]
    if not layout.size:
        return Canonical(slices, 1, 1, length, slices, False)
    if not layout.factored:
        leads = all(axis in layout.batch for axis in axes[: sum(axis in layout.batch for axis in axes)])
        return Canonical(slices, 1, 1, length, slices, False) if leads else None
    forms = [form for transposed in (False, True) if (form := _match(layout, axes, transposed))]
    return max(forms, key=lambda form: form.columns, default=None)


def _match(layout: Layout, axes: list[int], transposed: bool) -> Canonical | None:
    outside, inside = (layout.columns, layout.rows) if transposed else (layout.rows, layout.columns)
    stack = [axis for axis in axes if axis not in (*outside, *inside, *layout.batch)]
    slices = math.prod(layout.shape[axis] for axis in layout.batch)
    at = 0

    def take(belongs: Callable[[int], bool]) -> int:
        nonlocal at
        size = 1
        while at < len(axes) and belongs(axes[at]):
            size *= layout.shape[axes[at]]
            at += 1
        return size

    take(layout.batch.__contains__)
    outer = slices * take(stack.__contains__)
    rows = take(outside.__contains__)
    inner = take(stack.__contains__)
    columns = take(inside.__contains__)
    return Canonical(outer, rows, inner, columns, slices, True, transposed) if at == len(axes) else None
