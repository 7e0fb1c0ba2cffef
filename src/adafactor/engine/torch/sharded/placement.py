"""Where a shard lies in its parameter, and which of its sums other shards have to complete. Plain data.

A mesh is an array of processes; each of its dimensions splits one axis of a parameter, or none and repeats it. What
follows from that for a matrix:

    split are        complete here    sums to add up                       rounds
    nothing          everything       -                                    0
    rows             rows             S, W, Q                              1
    columns          columns          the same, rows and columns transposed    1
    only a stack     rows, columns    Σu², Q                               1
    only the batch   everything       -                                    0
    more than one    nothing          row sums, S, Q; then Σu²             2
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

from adafactor.core.factoring import Cut, Layout, Part, Shape


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
class Placement:
    """One process's share of one parameter.

    Attributes:
        layout: of the whole parameter.
        mesh: processes along every dimension of the mesh.
        coordinate: where in the mesh this process is.
        splits: what every dimension of the mesh does.
    """

    layout: Layout
    mesh: Shape
    coordinate: Shape
    splits: tuple[Split, ...]

    @cached_property
    def dims(self) -> Shape:
        """The mesh dimensions that split anything."""
        return tuple(dim for dim, split in enumerate(self.splits) if split.axis is not None and self.mesh[dim] > 1)

    def split_by(self, dim: int) -> int | None:
        """The axis that a mesh dimension splits."""
        return self.splits[dim].axis if dim in self.dims else None

    @cached_property
    def split(self) -> frozenset[int]:
        """The axes that are split."""
        return frozenset(axis for dim in self.dims if (axis := self.splits[dim].axis) is not None)

    @cached_property
    def part(self) -> Part:
        """What this process holds. An axis is cut as ``torch.chunk`` cuts it: the last pieces may be empty.

        Raises:
            ValueError: the dimensions that split one axis do not say in which order.
        """
        shape, offset = list(self.layout.shape), [0] * len(self.layout.shape)
        for axis in self.split:
            for dim in self._order(axis):
                size = -(-shape[axis] // self.mesh[dim])
                first = min(shape[axis], size * self.coordinate[dim])
                shape[axis] = min(size, shape[axis] - first)
                offset[axis] += first
        layout = self.layout
        return Part(tuple(shape), layout.rows, layout.columns, layout.batch, layout.shape, tuple(offset), self.split)

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
        """How the sums become complete."""
        return self.part.cut

    @cached_property
    def transposed(self) -> bool:
        """Whether rows and columns change places, so that the rows are what is split."""
        return self.cut == "rows" and bool(self.split & set(self.layout.columns))

    @property
    def local(self) -> Part:
        """The part as kernels see it: with its rows split, if either side is."""
        return self.part.transposed if self.transposed else self.part

    def contributes(self, group: Shape, summed: Shape = ()) -> bool:
        """Whether this process adds its value: of processes along ``group`` that hold the same, the first.

        Args:
            group: the mesh dimensions that the sum runs over.
            summed: axes that the value has been summed over before, so that it is the same for all their shards.
        """
        repeats = [dim for dim in group if self.split_by(dim) is None or self.split_by(dim) in summed]
        return all(self.coordinate[dim] == 0 for dim in repeats)

    def buffer(self, reduced: Shape, group: Shape) -> tuple[Shape, tuple[slice, ...]]:
        """The shape in which values of all processes along ``group`` have room, and where this one's goes.

        Args:
            reduced: axes that have length 1 in the value; its others have the part's lengths.
        """
        part = self.part
        split = {self.split_by(dim) for dim in group}
        shape, place = [], []
        for axis, length in enumerate(part.shape):
            if axis in reduced:
                shape.append(1)
                place.append(slice(0, 1))
            elif axis in split:
                shape.append(part.whole_shape[axis])
                place.append(slice(part.offset[axis], part.offset[axis] + length))
            else:
                shape.append(length)
                place.append(slice(0, length))
        return tuple(shape), tuple(place)


def sums(placement: Placement, group: Shape, scale_parameter: bool) -> tuple[int, int]:
    """How many numbers a parameter adds to the first and to the second round: what the packed buffers hold.

    Two flags per parameter (a gradient that is not finite, a gradient that is there) are counted in the first.
    """
    layout = placement.layout
    if not placement.dims:
        return 0, 0

    def size(reduced: Shape) -> int:
        return math.prod(placement.buffer(reduced, group)[0])

    if placement.cut == "nothing":
        return 2, 0
    first = 2 + (size(layout.whole) if scale_parameter else 0)
    if placement.cut == "stack":
        return first + size(layout.whole), 0
    sides = (layout.columns, layout.rows) if placement.transposed else (layout.rows, layout.columns)
    if placement.cut == "rows":
        return first + 2 * size(sides[0]), 0
    if placement.split & set(layout.rows):
        first += size(layout.rows)
    if placement.split & set(layout.columns):
        first += size(layout.columns)
    return first, 2 * size((*layout.rows, *layout.columns))
