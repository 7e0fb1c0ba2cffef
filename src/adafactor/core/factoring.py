"""Which axes of a parameter become rows and which columns, decided on plain data.

A shape and a policy give a :class:`Layout`; kernels, front ends, checkpoints and memory plans read the same
one. No array is touched here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from numbers import Integral
from typing import Literal

from adafactor.core.errors import message

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Factored:
    """The role of each axis of one parameter. Axes count from 0; negative ones from the end.

    Args:
        rows: axes that index the rows of the matrix; several axes act as one long axis.
        columns: axes that index its columns. Without rows and columns the parameter is not factored.
        batch: axes of stacked layers or experts: never factored over, and the update clipping and the
            parameter scale are taken per slice.

    An axis that is named nowhere indexes a stack of matrices with a row and a column statistic each, while
    clipping and parameter scale are taken over the whole stack.
    """

    rows: Shape = ()
    columns: Shape = ()
    batch: Shape = ()


Policy = Literal["last_two", "largest_two", "smallest"]
Rule = Callable[[str, Shape], Factored | None]
Factoring = Policy | Rule
POLICIES: tuple[Policy, ...] = ("last_two", "largest_two", "smallest")


#: What a part's sums lack: nothing, column sums (its rows are cut, or its columns if it is transposed), only what other
#: matrices of a stack add to a slice, or row sums and column sums.
Cut = Literal["nothing", "rows", "stack", "both"]


@dataclass(frozen=True)
class Layout:
    """A parameter's shape with the role of every axis: all that a kernel needs to know about it.

    Attributes:
        shape: the parameter's shape.
        rows, columns: axes kept by the row and by the column statistic; both empty if unfactored.
        batch: axes with a clip factor and a parameter scale of their own.
    """

    shape: Shape
    rows: Shape
    columns: Shape
    batch: Shape = ()

    @property
    def factored(self) -> bool:
        return bool(self.rows)

    @cached_property
    def size(self) -> int:
        """N, the number of elements."""
        return math.prod(self.shape)

    @cached_property
    def row_shape(self) -> Shape:
        """Shape of the row statistic: the parameter's without its column axes."""
        return tuple(self.shape[axis] for axis in self.keeps("row"))

    @cached_property
    def column_shape(self) -> Shape:
        """Shape of the column statistic: the parameter's without its row axes."""
        return tuple(self.shape[axis] for axis in self.keeps("column"))

    @cached_property
    def n(self) -> int:
        """Rows of each matrix: what a column sum adds up."""
        return math.prod(self.shape[axis] for axis in self.rows)

    @cached_property
    def m(self) -> int:
        """Columns of each matrix: what a row sum adds up."""
        return math.prod(self.shape[axis] for axis in self.columns)

    @cached_property
    def whole(self) -> Shape:
        """Axes that update clipping and parameter scale reduce: all but the batch axes."""
        return tuple(axis for axis in range(len(self.shape)) if axis not in self.batch)

    @cached_property
    def slice_size(self) -> int:
        """Elements behind one clip factor; equals ``size`` without batch axes."""
        return math.prod(self.shape[axis] for axis in self.whole)

    @cached_property
    def slots(self) -> dict[str, Shape]:
        """Name and shape of every second-moment statistic, in the order in which they are stored."""
        if self.factored:
            return {"row": self.row_shape, "column": self.column_shape}
        return {"second_moment": self.shape}

    def lacks(self, slot: str) -> Shape:
        """The axes that a statistic is a mean over; whatever else is kept of a parameter lacks none."""
        return {"row": self.columns, "column": self.rows}.get(slot, ())

    def keeps(self, slot: str) -> Shape:
        """The other axes, in order."""
        lacks = self.lacks(slot)
        return tuple(axis for axis in range(len(self.shape)) if axis not in lacks)

    @property
    def cut(self) -> Cut:
        """What of its matrices and slices other processes hold."""
        return "nothing"

    @property
    def state_size(self) -> int:
        """Numbers kept for the second moment."""
        return sum(math.prod(shape) for shape in self.slots.values())


@dataclass(frozen=True)
class Part(Layout):
    """The part of a parameter that one process holds: the shape is the part's, and what divides a sum is the whole's.

    Attributes:
        whole_shape: the parameter's shape.
        offset: where the part begins in it, axis by axis.
        split: the axes that other processes hold pieces of.
    """

    whole_shape: Shape = ()
    offset: Shape = ()
    split: frozenset[int] = frozenset()

    @cached_property
    def n(self) -> int:
        """Rows of each whole matrix."""
        return math.prod(self.whole_shape[axis] for axis in self.rows)

    @cached_property
    def m(self) -> int:
        """Columns of each whole matrix."""
        return math.prod(self.whole_shape[axis] for axis in self.columns)

    @cached_property
    def slice_size(self) -> int:
        """Elements behind one clip factor, in all parts."""
        return math.prod(self.whole_shape[axis] for axis in self.whole)

    @cached_property
    def cut(self) -> Cut:
        sides = [side for side in (self.rows, self.columns) if self.split & set(side)]
        if not self.split - set(self.batch):
            return "nothing"
        if not sides:
            return "stack"
        # A slice of a batch has its own clip factor, but its sums must not be added to another slice's: a part that
        # has some slices and some rows of them puts S and W in their own places of one buffer.
        elsewhere = self.split - set(self.rows) - set(self.columns) - set(self.batch)
        return "rows" if len(sides) == 1 and not elsewhere else "both"

    @property
    def transposed(self) -> Part:
        """The same part with rows and columns in each other's place."""
        return replace(self, rows=self.columns, columns=self.rows)


def layout(
    shape: Iterable[int],
    factoring: Factoring = "last_two",
    min_dim_size_to_factor: int = 1,
    *,
    name: str = "",
    batch_axes: Iterable[int] = (),
) -> Layout:
    """Decide the role of every axis of a parameter.

    Args:
        shape: the parameter's shape, rank 0 and up.
        factoring: ``"last_two"`` axes, the ``"largest_two"`` axes (of equal ones, the last), ``"smallest"``:
            the cut of the shape in two with the fewest numbers to keep, or a callable
            ``(name, shape) -> Factored | None``, where ``None`` keeps the whole second moment.
        min_dim_size_to_factor: a policy leaves a parameter unfactored when either side of the matrix is
            smaller. A callable's word is final.
        name: what a callable is asked with, and errors name.
        batch_axes: axes a policy must treat as ``Factored.batch``.

    Parameters of fewer than two free axes, and empty ones, are never factored.

    Raises:
        TypeError, ValueError: the policy is unknown, or a callable gave roles that do not fit the shape.
    """
    shape = tuple(int(n) for n in shape)
    if callable(factoring):
        spec = factoring(name, shape)
        if spec is None:
            spec = Factored()
        elif not isinstance(spec, Factored):
            remedy = "Return adafactor.Factored(rows=..., columns=...) or None."
            raise TypeError(message(f"factoring({name!r}, {shape})", "a Factored or None", spec, remedy))
        return _checked(shape, spec, name)
    validate(factoring, min_dim_size_to_factor)
    batch = _axes(batch_axes, shape, name, "batch")
    free = tuple(axis for axis in range(len(shape)) if axis not in batch)
    unfactored = Layout(shape, (), (), batch)
    if len(free) < 2 or not unfactored.size:
        return unfactored
    factored = Layout(shape, *_choose(shape, free, factoring), batch)
    return factored if min(factored.n, factored.m) >= min_dim_size_to_factor else unfactored


def validate(factoring: object, min_dim_size_to_factor: object) -> None:
    """Refuse an unknown policy or an impossible size before any shape is seen.

    Raises:
        TypeError, ValueError: with the argument, the rule, the value and the remedy.
    """
    if not (callable(factoring) or factoring in POLICIES):
        choices = ", ".join(f'"{policy}"' for policy in POLICIES)
        remedy = 'The default is "last_two".'
        raise ValueError(message("factoring", f"{choices} or a callable (name, shape) -> Factored", factoring, remedy))
    if isinstance(min_dim_size_to_factor, bool) or not isinstance(min_dim_size_to_factor, Integral):
        raise TypeError(message("min_dim_size_to_factor", "an integer", min_dim_size_to_factor, "Pass 1 for all."))
    if int(min_dim_size_to_factor) < 1:
        raise ValueError(message("min_dim_size_to_factor", ">= 1", min_dim_size_to_factor, "Pass 1 for all."))


def _choose(shape: Shape, free: Shape, policy: str) -> tuple[Shape, Shape]:
    if policy == "last_two":
        return free[-2:-1], free[-1:]
    if policy == "largest_two":
        first, second = sorted(sorted(free, key=lambda axis: shape[axis])[-2:])
        return (first,), (second,)
    # "smallest": a cut keeps prod(left) + prod(right) numbers, and a matrix only pays if that is fewer than
    # the parameter has.
    size = math.prod(shape[axis] for axis in free)
    cuts = [math.prod(shape[axis] for axis in free[:k]) for k in range(1, len(free))]
    kept, k = min((left + size // left, k) for k, left in enumerate(cuts, start=1))
    return (free[:k], free[k:]) if kept < size else ((), ())


def _checked(shape: Shape, spec: Factored, name: str) -> Layout:
    rows, columns, batch = (
        _axes(axes, shape, name, role)
        for axes, role in ((spec.rows, "rows"), (spec.columns, "columns"), (spec.batch, "batch"))
    )
    named = (*rows, *columns, *batch)
    if len(set(named)) != len(named):
        raise ValueError(message(f"factoring of {name!r}", "one role per axis", spec, f"Its shape is {shape}."))
    if bool(rows) != bool(columns):
        remedy = "Name both, or neither to keep the whole second moment."
        raise ValueError(message(f"factoring of {name!r}", "both rows and columns", spec, remedy))
    if 0 in shape:
        rows, columns = (), ()
    return Layout(shape, rows, columns, batch)


def _axes(axes: Iterable[int], shape: Shape, name: str, role: str) -> Shape:
    axes = tuple(axes)
    rank = len(shape)
    if not all(isinstance(axis, int) and -rank <= axis < rank for axis in axes):
        rule = f"axes of a parameter of rank {rank}"
        raise ValueError(message(f"{role} of {name!r}", rule, axes, f"Its shape is {shape}."))
    return tuple(sorted(axis % rank for axis in axes))
