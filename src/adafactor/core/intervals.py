"""Where an interval of a flattened tensor lies in its matrices, and which sums other intervals complete. Plain data.

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

Interval = tuple[int, int]
Index = slice | NDArray[np.int64]


@dataclass(frozen=True)
class Box(Part):
    """A part that is one piece of memory of an interval."""

    @cached_property
    def cut(self) -> Cut:
        if not self.factored:
            return "stack"
        return "rows" if all(self.shape[axis] == self.whole_shape[axis] for axis in self.columns) else "both"

    def place(self, reduced: Shape) -> tuple[slice, ...]:
        """Where a value with ``reduced`` axes of length 1 lies in that of the whole tensor."""
        return _place(self.offset, self.shape, reduced)


@dataclass(frozen=True)
class Spot:
    """What one box of this process adds to a sum, and gets back.

    Attributes:
        box: its number.
        mine: which numbers of the box's flattened value, and ``there``: their places in the sum.
    """

    box: int
    mine: Index
    there: Index


@dataclass(frozen=True)
class Shared:
    """The numbers of one kind that more than one box has a part in, in the order of the whole tensor.

    Attributes:
        size: how many.
        numbers: their places in the flattened value of the whole tensor.
        spots: this process's.
    """

    size: int
    numbers: Index
    spots: tuple[Spot, ...]


@dataclass(frozen=True)
class Flat:
    """One tensor that several processes hold intervals of.

    Attributes:
        given: the tensor's layout.
        intervals: what every process holds of the flattened tensor; they do not overlap.
        rank: which one is here.
    """

    given: Layout
    intervals: tuple[Interval, ...]
    rank: int

    @property
    def transposed(self) -> bool:
        """Whether rows and columns change places, so that the columns are what is contiguous."""
        return self.given.factored and min(self.given.rows) > min(self.given.columns)

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
    def boxes(self) -> list[Box]:
        """What this process holds, in the order of memory."""
        return [self._box(offset, shape) for offset, shape in boxes(self.layout.shape, *self.intervals[self.rank])]

    @cached_property
    def hull(self) -> Box:
        """The least box around this process's that has all columns of its matrices. Its statistics are kept."""
        layout, ends = self.layout, self.boxes[:1] + self.boxes[-1:]
        first_column = min(layout.columns, default=0)
        offset, shape = [0] * len(layout.shape), list(layout.shape)
        for axis in range(first_column):
            low = ends[0].offset[axis]
            high = ends[-1].offset[axis] + ends[-1].shape[axis]
            offset[axis], shape[axis] = low, high - low
            if high - low > 1:
                break
        return self._box(tuple(offset), tuple(shape))

    def kept(self, slot: str) -> int:
        """How many numbers of a statistic, by its name in the given layout, are kept here."""
        if not self.boxes or slot not in self.given.slots:
            return 0
        if slot == "second_moment":
            return sum(box.size for box in self.boxes)
        return math.prod(self.hull.row_shape if (slot == "row") != self.transposed else self.hull.column_shape)

    def within(self, box: Box, slot: str) -> tuple[Shape, tuple[slice, ...]]:
        """The shape of the row or column statistic (of `layout`) that is kept here, and a box's place in it."""
        lacks = self.layout.lacks(slot)
        shape = tuple(1 if axis in lacks else n for axis, n in enumerate(self.hull.shape))
        place = zip(box.place(lacks), self.hull.place(lacks), strict=True)
        return shape, tuple(slice(part.start - all_.start, part.stop - all_.start) for part, all_ in place)

    @cached_property
    def slice_of(self) -> NDArray[np.int64]:
        """Of every matrix in `matrices` its slice, by its number among those that more than one box has a part in."""
        layout = self.layout
        shapes = [
            tuple(1 if axis in reduced else n for axis, n in enumerate(layout.shape))
            for reduced in ((*layout.rows, *layout.columns), layout.whole)
        ]
        places = np.unravel_index(_array(self.matrices.numbers), shapes[0])
        slices = np.ravel_multi_index(
            tuple(np.minimum(p, n - 1) for p, n in zip(places, shapes[1], strict=True)), shapes[1]
        )
        return np.searchsorted(_array(self.shared(layout.whole).numbers), slices)

    def _box(self, offset: Shape, shape: Shape) -> Box:
        layout = self.layout
        split = frozenset(axis for axis, n in enumerate(shape) if n != layout.shape[axis])
        return Box(shape, layout.rows, layout.columns, layout.batch, layout.shape, offset, split)

    def shared(self, reduced: Shape) -> Shared:
        """The numbers of a value with ``reduced`` axes of length 1 that more than one box adds to."""
        count = self._counts[reduced]
        numbers = np.flatnonzero(count > 1)
        order: NDArray[np.int64] = np.full(count.shape, -1)
        order.reshape(-1)[numbers] = np.arange(len(numbers))
        spots = []
        for k, box in enumerate(self.boxes):
            there = order[box.place(reduced)].reshape(-1)
            mine = np.flatnonzero(there >= 0)
            if len(mine):
                spots.append(Spot(k, _index(mine), _index(there[mine])))
        return Shared(len(numbers), _index(numbers) if len(numbers) else slice(0), tuple(spots))

    @cached_property
    def _counts(self) -> dict[Shape, NDArray[np.uint8]]:
        """How many boxes of all processes have a part in each number, by the axes that it lacks: 2 for more as well."""
        layout = self.layout
        kinds = {layout.whole}
        if layout.factored:
            kinds |= {layout.columns, layout.rows, (*layout.rows, *layout.columns)}
        shapes = {axes: [1 if k in axes else n for k, n in enumerate(layout.shape)] for axes in kinds}
        counts = {axes: np.zeros(shape, np.uint8) for axes, shape in shapes.items()}
        for interval in self.intervals:
            for offset, shape in boxes(layout.shape, *interval):
                for axes, count in counts.items():
                    room = count[_place(offset, shape, axes)]
                    np.minimum(room + 1, 2, out=room)
        return counts

    def forget(self) -> None:
        """Let go of what only `shared` needs."""
        self.__dict__.pop("_counts", None)

    @cached_property
    def matrices(self) -> Shared:
        """The matrices of which there is more than one box."""
        return self.shared((*self.layout.rows, *self.layout.columns))

    @property
    def stacked(self) -> bool:
        """Whether a slice has several matrices."""
        axes = {*self.layout.rows, *self.layout.columns, *self.layout.batch}
        return any(n > 1 for axis, n in enumerate(self.layout.shape) if axis not in axes)

    def sums(self, scale_parameter: bool) -> tuple[int, int]:
        """How many numbers the tensor adds to the first and to the second round.

        In the first are two flags (a gradient that is not finite, a gradient that is there), Q of cut slices, and of a
        factored tensor the row sums of cut rows and S of the columns of cut matrices; of an unfactored one the sum of
        u² of cut slices. In the second, of a factored tensor, two numbers for every cut matrix, and in a stack one for
        every cut slice.
        """
        layout = self.layout
        slices = self.shared(layout.whole).size
        first = 2 + slices * scale_parameter
        if not layout.factored:
            return first + slices, 0
        first += self.shared(layout.columns).size + self.shared(layout.rows).size
        return first, 2 * self.matrices.size + slices * self.stacked


def _place(offset: Shape, shape: Shape, reduced: Shape) -> tuple[slice, ...]:
    return tuple(
        slice(0, 1) if axis in reduced else slice(first, first + n)
        for axis, (first, n) in enumerate(zip(offset, shape, strict=True))
    )


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


def _index(numbers: NDArray[np.int64]) -> Index:
    """A slice where they follow one another."""
    first, last = int(numbers[0]), int(numbers[-1])
    return slice(first, last + 1) if last - first + 1 == len(numbers) else numbers


def _array(index: Index) -> NDArray[np.int64]:
    return np.arange(index.start or 0, index.stop) if isinstance(index, slice) else index


def cuts(first: int, size: int, pieces: Sequence[Interval]) -> tuple[Interval, ...]:
    """The intervals of a tensor that begins at ``first`` of a buffer of which every process holds a piece."""
    return tuple((min(size, max(0, begin - first)), min(size, max(0, end - first))) for begin, end in pieces)
