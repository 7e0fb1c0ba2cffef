"""The one form in which the native kernels see a parameter: x[b0][n][B1][m] with contiguous m.

Plain data, no array is touched. ``native/adafactor.h`` describes the form.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from adafactor.core.factoring import Layout
from adafactor.core.hyperparameters import message


class Canonical(NamedTuple):
    """A layout in the kernels' words.

    Attributes:
        b0, n, B1, m: a stack of b0 × B1 matrices with n rows and m columns. Not factored: b0 slices of m numbers.
        slices: how many clip factors and parameter scales; b0 is a multiple of it.
        factored: whether there is a row and a column statistic.
        swapped: the layout's columns act as the kernel's rows and its rows as the kernel's columns. The step is the
            same (docs/algorithm.md, "Measure").
        columns_first: measure finishes the kernel's columns and adds up its rows: what a part needs whose columns are
            whole and whose rows are not. Only where B1 is 1.
    """

    b0: int
    n: int
    B1: int
    m: int
    slices: int
    factored: bool
    swapped: bool = False
    columns_first: bool = False

    @property
    def size(self) -> int:
        return self.b0 * self.n * self.B1 * self.m

    @property
    def finished_size(self) -> int:
        """Numbers in the statistic that measure finishes, the kernel's row unless ``columns_first``."""
        return self.b0 * self.B1 * (self.m if self.columns_first else self.n) if self.factored else 0

    @property
    def sums_size(self) -> int:
        """Numbers in each of S and W."""
        return self.b0 * self.B1 * (self.n if self.columns_first else self.m) if self.factored else self.slices

    @property
    def slots(self) -> tuple[str, str]:
        """Names of the statistics that the kernel takes as its row and its column ("" for none)."""
        if not self.factored:
            return "second_moment", ""
        return ("column", "row") if self.swapped else ("row", "column")


def canonical(layout: Layout, permutation: Sequence[int] | None = None) -> Canonical | None:
    """The kernels' form of ``layout``, or ``None`` where it has none and the caller takes another way.

    Args:
        layout: the role of every axis.
        permutation: the axes in the order of memory, outermost first, of a parameter that is dense but permuted
            (a channels-last tensor: ``(0, 2, 3, 1)``). Gradient and momentum must have the same order, and the
            statistics their own axes in this order too: dense, permuted likewise. Default: C order.

    From outside in, a form exists for batch axes, stack, one side of the matrix, stack, the other side, where each
    may be missing or span several axes, and axes of size 1 may stand anywhere. There is none for an interleaved
    side, a stack inside the matrix's inner side, or batch axes that do not lead.
    """
    rank = len(layout.shape)
    order = tuple(range(rank)) if permutation is None else tuple(permutation)
    if sorted(order) != list(range(rank)):
        raise ValueError(message("permutation", f"an order of the {rank} axes", order, "Name every axis once."))
    slices = math.prod(layout.shape[axis] for axis in layout.batch)
    length = math.prod(layout.shape[axis] for axis in layout.whole)  # of a slice, as far as it is here
    axes = [axis for axis in order if layout.shape[axis] != 1]
    if not layout.size:
        return Canonical(slices, 1, 1, length, slices, False)
    if not layout.factored:
        leads = all(axis in layout.batch for axis in axes[: sum(axis in layout.batch for axis in axes)])
        return Canonical(slices, 1, 1, length, slices, False) if leads else None
    forms = [
        form
        for swapped, (outer, inner) in enumerate([(layout.rows, layout.columns), (layout.columns, layout.rows)])
        if (form := _match(layout, axes, outer, inner, slices, bool(swapped)))
    ]
    return max(forms, key=lambda form: form.m, default=None)


def _match(
    layout: Layout, axes: list[int], outer: Sequence[int], inner: Sequence[int], slices: int, swapped: bool
) -> Canonical | None:
    sides = (*outer, *inner)
    stack = [axis for axis in axes if axis not in sides and axis not in layout.batch]
    place = 0

    def take(belongs: Callable[[int], bool]) -> int:
        nonlocal place
        size = 1
        while place < len(axes) and belongs(axes[place]):
            size *= layout.shape[axes[place]]
            place += 1
        return size

    take(layout.batch.__contains__)
    b0 = slices * take(stack.__contains__)
    n = take(outer.__contains__)
    B1 = take(stack.__contains__)
    m = take(inner.__contains__)
    return Canonical(b0, n, B1, m, slices, True, swapped) if place == len(axes) else None
