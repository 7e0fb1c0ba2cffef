"""Where an interval of a flattened tensor lies in its matrices. Plain data.

ZeRO and FSDP1 cut the concatenation of flattened parameters, wherever the cut falls. An interval [begin, end) of a
tensor in row-major order is a few boxes: of a matrix the rest of a row, whole rows, and the beginning of a row. Each
is a part like any other; what it lacks depends on its columns:

    box with           complete here    to add up
    whole rows         rows             S, Q; then what eq. 7 adds up
    a piece of a row   nothing          its row sum, S, Q; then the same

What only one box of all processes holds is complete and is not sent.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from adafactor.core.factoring import Cut, Layout, Part, Shape
from adafactor.core.placement import Placement, Shared, Spot, index, within

Interval = tuple[int, int]


@dataclass(frozen=True)
class Box(Part):
    """A part that is one piece of memory of an interval."""

    @cached_property
    def cut(self) -> Cut:
        if not self.factored:
            return "stack"
        return "rows" if all(self.shape[axis] == self.whole_shape[axis] for axis in self.columns) else "both"

    def within(self, reduced: Shape) -> tuple[slice, ...]:
        """Where a value with ``reduced`` axes of length 1 lies in that of the whole tensor."""
        return within(self.offset, self.shape, reduced)


@dataclass(frozen=True)
class FlatPlacement(Placement):
    """One tensor that several processes hold intervals of.

    Attributes:
        intervals: what every process holds of the flattened tensor; they do not overlap.
        rank: which one is here.
    """

    given: Layout
    intervals: tuple[Interval, ...]
    rank: int

    @property
    def transposed(self) -> bool:
        """As by default, but so that the columns are what is contiguous."""
        return self.given.factored and min(self.given.rows) > min(self.given.columns)

    @property
    def cut(self) -> Cut:
        return "both" if self.given.factored else "stack"

    @cached_property
    def layout(self) -> Layout:
        """The layout with neighbouring axes of one role as one axis, and the columns as the inner side."""
        given = self.given
        rows, columns = (given.columns, given.rows) if self.transposed else (given.rows, given.columns)
        shape: list[int] = []
        roles: list[str] = []
        for axis, n in enumerate(given.shape):
            role = "r" if axis in rows else "c" if axis in columns else "b" if axis in given.batch else "s"
            if roles and roles[-1] == role:
                shape[-1] *= n
            else:
                shape.append(n)
                roles.append(role)
        at = {role: tuple(axis for axis, its in enumerate(roles) if its == role) for role in "rcb"}
        return Layout(tuple(shape) or (1,), at["r"], at["c"], at["b"])

    @cached_property
    def parts(self) -> Sequence[Box]:
        """What this process holds, in the order of memory."""
        return [self._box(offset, shape) for offset, shape in boxes(self.layout.shape, *self.intervals[self.rank])]

    @cached_property
    def hull(self) -> Box:
        """The least box around this process's that has all columns of its matrices. Its statistics are kept."""
        layout, first, last = self.layout, self.parts[0], self.parts[-1]
        first_column = min(layout.columns, default=0)
        offset, shape = [0] * len(layout.shape), list(layout.shape)
        for axis in range(first_column):
            low = first.offset[axis]
            high = last.offset[axis] + last.shape[axis]
            offset[axis], shape[axis] = low, high - low
            if high - low > 1:
                break
        return self._box(tuple(offset), tuple(shape))

    def kept(self, slot: str) -> int:
        """How many numbers of a statistic, by its name in the given layout, are kept here."""
        if not self.parts or slot not in self.given.slots:
            return 0
        if slot == "second_moment":
            return sum(box.size for box in self.parts)
        return math.prod(self.hull.row_shape if self.here(slot) == "row" else self.hull.column_shape)

    def in_hull(self, box: Box, slot: str) -> tuple[Shape, tuple[slice, ...]]:
        """The shape of the row or column statistic (of `layout`) that is kept here, and a box's place in it."""
        lacks = self.layout.lacks(slot)
        shape = tuple(1 if axis in lacks else n for axis, n in enumerate(self.hull.shape))
        place = zip(box.within(lacks), self.hull.within(lacks), strict=True)
        return shape, tuple(slice(part.start - all_.start, part.stop - all_.start) for part, all_ in place)

    def _box(self, offset: Shape, shape: Shape) -> Box:
        layout = self.layout
        split = frozenset(axis for axis, n in enumerate(shape) if n != layout.shape[axis])
        return Box(shape, layout.rows, layout.columns, layout.batch, layout.shape, offset, split)

    def shared(self, reduced: Shape) -> Shared:
        """The numbers that more than one box of all processes adds to."""
        whole = self.layout.shape
        count = np.zeros([1 if axis in reduced else n for axis, n in enumerate(whole)], np.uint8)
        for interval in self.intervals:
            for offset, shape in boxes(whole, *interval):
                room = count[within(offset, shape, reduced)]
                np.minimum(room + 1, 2, out=room)
        numbers = np.flatnonzero(count > 1)
        order: NDArray[np.int64] = np.full(count.shape, -1)
        order.reshape(-1)[numbers] = np.arange(len(numbers))
        spots = []
        for k, box in enumerate(self.parts):
            there = order[box.within(reduced)].reshape(-1)
            mine = np.flatnonzero(there >= 0)
            if len(mine):
                spots.append(Spot(k, None if len(mine) == len(there) else index(mine), index(there[mine])))
        return Shared(numbers, tuple(spots))

    @property
    def stacked(self) -> bool:
        axes = {*self.layout.rows, *self.layout.columns, *self.layout.batch}
        return any(n > 1 for axis, n in enumerate(self.layout.shape) if axis not in axes)


def boxes(shape: Shape, begin: int, end: int) -> Iterator[tuple[Shape, Shape]]:
    """Offset and shape of the boxes that an interval of a row-major array is, in order; none of an empty one."""
    if begin >= end:
        return
    inner = math.prod(shape[1:])
    if len(shape) == 1:
        yield (begin,), (end - begin,)
        return
    (first, head), (last, tail) = divmod(begin, inner), divmod(end, inner)

    def inside(at: int, start: int, stop: int) -> Iterator[tuple[Shape, Shape]]:
        return (((at, *offset), (1, *size)) for offset, size in boxes(shape[1:], start, stop))

    if first == last:
        yield from inside(first, head, tail)
        return
    if head:
        yield from inside(first, head, inner)
    if first + bool(head) < last:
        yield (first + bool(head), *(0,) * (len(shape) - 1)), (last - first - bool(head), *shape[1:])
    yield from inside(last, 0, tail)


def cuts(first: int, size: int, pieces: Sequence[Interval]) -> tuple[Interval, ...]:
    """The intervals of a tensor that begins at ``first`` of a buffer of which every process holds a piece."""
    return tuple((min(size, max(0, begin - first)), min(size, max(0, end - first))) for begin, end in pieces)
