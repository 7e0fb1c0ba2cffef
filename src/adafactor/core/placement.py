"""What one process holds of a parameter, and which of its sums other processes have to complete. Plain data.

A placement says which parts of the parameter are here, and who adds what to a sum: mostly column sums of rows that lie
elsewhere. It is made of a mesh of processes whose dimensions split axes (`MeshPlacement`, one part), or of an interval
of the flattened parameter (`intervals.FlatPlacement`, a few parts). What is to be added up follows from how it is cut:

    cut        complete here    first round                     second round
    nothing    everything       -                               -
    rows       rows             S, W, Q                         -
    stack      rows, columns    Σu², Q                          -
    both       nothing          S, sums of cut rows, Q          of every matrix the mean of its columns, Σ W / column
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from adafactor.core.factoring import Cut, Layout, Part, Shape

Index = slice | NDArray[np.int64]


@dataclass(frozen=True)
class Spot:
    """What one part of this process adds to a sum, and gets back.

    Attributes:
        part: its number.
        mine: which numbers of the part's flattened value, ``None`` for all; ``there``: their places in the sum.
    """

    part: int
    mine: Index | None
    there: Index


@dataclass(frozen=True)
class Shared:
    """The numbers of one kind that are added up, in the order of the whole parameter.

    Attributes:
        numbers: their places in the flattened value of the whole parameter.
        spots: this process's.
    """

    numbers: NDArray[np.int64]
    spots: tuple[Spot, ...]

    @property
    def size(self) -> int:
        return len(self.numbers)


class Placement(ABC):
    """One process's share of one parameter.

    Attributes:
        given: the parameter's layout.
    """

    given: Layout

    @property
    def dims(self) -> Shape:
        """The dimensions of a mesh that split anything."""
        return ()

    @property
    @abstractmethod
    def transposed(self) -> bool:
        """Whether rows and columns change places here, so that the rows are what is cut."""

    @property
    @abstractmethod
    def layout(self) -> Layout:
        """The whole parameter's layout as the parts have it."""

    @property
    @abstractmethod
    def cut(self) -> Cut:
        """How the sums become complete."""

    @property
    @abstractmethod
    def parts(self) -> Sequence[Part]:
        """What this process holds."""

    @abstractmethod
    def shared(self, reduced: Shape) -> Shared:
        """What is added up of a value with ``reduced`` axes of length 1."""

    @property
    def stacked(self) -> bool:
        """Whether slices have matrices that are complete somewhere beside others that are not."""
        return False

    def adds(self, group: Shape) -> bool:
        """Whether this process adds its values: of processes along mesh dimensions that hold the same, the first."""
        return True

    def here(self, slot: str) -> str:
        """A statistic's name in ``layout``."""
        return {"row": "column", "column": "row"}.get(slot, slot) if self.transposed else slot

    def first(self, scaled: bool) -> Iterator[tuple[str, Shape]]:
        """What the first round adds up: names in `Sums`, each with the axes that it lacks.

        Args:
            scaled: whether the parameter scale is asked for, and so Q.
        """
        layout, cut = self.layout, self.cut
        if cut == "nothing":
            return
        if scaled:
            yield "Q", layout.whole
        if cut == "stack":
            yield "u2" if layout.factored else "W", layout.whole
        elif cut == "rows":
            yield from (("S", layout.rows), ("W", layout.rows))
        else:
            yield from (("rows", layout.columns), ("S", layout.rows))

    @property
    def matrices(self) -> Shared:
        """The matrices of which there is more than one part."""
        return self.shared((*self.layout.rows, *self.layout.columns))

    @property
    def slices(self) -> Shared:
        """The slices of which there is more than one part."""
        return self.shared(self.layout.whole)

    def slice_of(self, matrices: Shared, slices: Shared) -> NDArray[np.int64]:
        """Of every matrix its slice, by its number among those that are added up."""
        layout = self.layout
        sides = (*layout.rows, *layout.columns)
        shapes = [[1 if k in axes else n for k, n in enumerate(layout.shape)] for axes in (sides, layout.whole)]
        places = np.unravel_index(matrices.numbers, shapes[0])
        numbers = np.ravel_multi_index(
            tuple(np.minimum(place, n - 1) for place, n in zip(places, shapes[1], strict=True)), shapes[1]
        )
        return np.searchsorted(slices.numbers, numbers)

    def sums(self, scaled: bool) -> tuple[int, int]:
        """How many numbers the parameter adds to the first and to the second round.

        In the first are two flags: a gradient that is not finite, a gradient that is there.
        """
        first = 2 + sum(self.shared(axes).size for _, axes in self.first(scaled))
        if self.cut != "both":
            return first, 0
        return first, 2 * self.matrices.size + self.stacked * self.slices.size


def within(offset: Shape, shape: Shape, reduced: Shape) -> tuple[slice, ...]:
    """Where a part's value with ``reduced`` axes of length 1 lies in that of the whole."""
    return tuple(
        slice(0, 1) if axis in reduced else slice(first, first + n)
        for axis, (first, n) in enumerate(zip(offset, shape, strict=True))
    )


def index(numbers: NDArray[np.int64]) -> Index:
    """A slice where they follow one another."""
    first, last = (int(numbers[0]), int(numbers[-1])) if len(numbers) else (0, -1)
    return slice(first, last + 1) if last - first + 1 == len(numbers) else numbers


@dataclass(frozen=True)
class Split:
    """What one mesh dimension does to a parameter.

    Attributes:
        axis: the axis it splits; ``None`` where every process along it has the same.
        after: into how many pieces dimensions further right have split that axis before this one split the
            pieces; 1 where this one came first. (FSDP splits what tensor parallelism has left, and stands to the left.)
    """

    axis: int | None
    after: int = 1


@dataclass(frozen=True)
class MeshPlacement(Placement):
    """A parameter whose axes the dimensions of a mesh of processes split, or repeat it.

    Attributes:
        mesh: processes along every dimension of the mesh.
        coordinate: where in the mesh this process is.
        splits: what every dimension of the mesh does.
    """

    given: Layout
    mesh: Shape
    coordinate: Shape
    splits: tuple[Split, ...]

    @cached_property
    def dims(self) -> Shape:
        return tuple(dim for dim, split in enumerate(self.splits) if split.axis is not None and self.mesh[dim] > 1)

    @cached_property
    def part(self) -> Part:
        """What this process holds. An axis is cut as ``torch.chunk`` cuts it: the last pieces may be empty.

        Raises:
            ValueError: the dimensions that split one axis do not say in which order.
        """
        given = self.given
        shape, offset = list(given.shape), [0] * len(given.shape)
        split = frozenset(axis for dim in self.dims if (axis := self.splits[dim].axis) is not None)
        for axis in split:
            for dim in self._order(axis):
                size = -(-shape[axis] // self.mesh[dim])
                first = min(shape[axis], size * self.coordinate[dim])
                shape[axis] = min(size, shape[axis] - first)
                offset[axis] += first
        return Part(tuple(shape), given.rows, given.columns, given.batch, given.shape, tuple(offset), split)

    def _order(self, axis: int) -> list[int]:
        """The dimensions that split an axis, in the order in which they did."""
        dims = [dim for dim in self.dims if self.splits[dim].axis == axis]
        order: list[int] = []
        for dim in reversed(dims):
            after = self.splits[dim].after
            first = [math.prod(self.mesh[d] for d in order[:k]) for k in range(len(order) + 1)]
            if after not in first:
                raise ValueError(str(after))
            order.insert(first.index(after), dim)
        return order

    @property
    def cut(self) -> Cut:
        return self.part.cut

    @cached_property
    def transposed(self) -> bool:
        return self.cut == "rows" and bool(self.part.split & set(self.given.columns))

    @cached_property
    def layout(self) -> Layout:
        given = self.given
        return replace(given, rows=given.columns, columns=given.rows) if self.transposed else given

    @cached_property
    def parts(self) -> Sequence[Part]:
        return [self.part.transposed if self.transposed else self.part]

    def adds(self, group: Shape) -> bool:
        return all(self.coordinate[dim] == 0 for dim in group if dim not in self.dims)

    def shared(self, reduced: Shape) -> Shared:
        part = self.part
        if not part.split & set(reduced):
            return Shared(np.arange(0), ())
        numbers = np.arange(math.prod(n for axis, n in enumerate(part.whole_shape) if axis not in reduced))
        shape = [1 if axis in reduced else n for axis, n in enumerate(part.whole_shape)]
        there = numbers.reshape(shape)[within(part.offset, part.shape, reduced)]
        return Shared(numbers, (Spot(0, None, index(there.reshape(-1))),))
