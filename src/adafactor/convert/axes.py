"""Statistics over other axes: what follows exactly from those there are, and what must be rebuilt.

A statistic is a mean of the second moment over the axes that it lacks. Means commute with the averaging over time, so
a statistic that lacks more axes than another follows from it exactly. Anything else comes from the estimate
row × column / mean.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from adafactor.convert.report import Change, Report
from adafactor.convert.state import STATISTICS, Array, Parameter
from adafactor.core import factoring
from adafactor.core.dialects import FORMATS
from adafactor.core.errors import Refused, message
from adafactor.core.factoring import POLICIES, Factored, Layout, Shape

Axes = Mapping[str, Factored | None]  # by a parameter's name
Shapes = Mapping[str, Shape]
Chooser = Callable[[Shape], Layout]


@dataclass(frozen=True, slots=True)
class Reader:
    """What is the same for all parameters of a file.

    Attributes:
        format: whose file it is.
        shapes: shapes by name, where the file leaves them open.
        axes: ``Factored`` by name, likewise.
    """

    format: str
    shapes: Shapes | None = None
    axes: Axes | None = None

    def shape(self, name: str, slots: Mapping[str, Array], known: Shape | None = None) -> Shape | None:
        """A parameter's shape: as it is ``known``, else as the user or its momentum tells."""
        told = None if self.shapes is None else self.shapes.get(name)
        own = slots["momentum"].shape if "momentum" in slots else None
        return known if known is not None else own if told is None else tuple(told)

    def read(self, name: str, slots: Mapping[str, Array], group: Mapping[str, Any], shape: Shape | None) -> Parameter:
        """A parameter without its count, with statistics of float32 or float64, its rows before its columns."""
        slots, dialect = dict(slots), FORMATS[self.format]
        if dialect.keeps_axes and "row" in slots:
            row, column = slots["row"].shape, slots["column"].shape
            shape = tuple(m if n == 1 else n for n, m in zip(row, column, strict=True))
            assert dialect.axes is not None
            theirs = dialect.axes(shape, 0)
            slots["row"], slots["column"] = slots["row"].squeeze(theirs.columns), slots["column"].squeeze(theirs.rows)
        statistics = {slot: wide(slots[slot]) for slot in STATISTICS if slot in slots}
        if not statistics:
            raise ValueError(f"{name} has no statistics")
        shapes = {slot: value.shape for slot, value in statistics.items()}
        layout = roles(name, shapes, self.choosers(name, group), shape=shape, axes=self.axes)
        return rows_first(Parameter(name, layout, slots | statistics, 0))

    def choosers(self, name: str, group: Mapping[str, Any]) -> list[Chooser]:
        """What may have chosen the axes. That they are factored is known."""
        dialect, policy = FORMATS[self.format], group.get("factoring")
        if dialect.axes is not None:
            sides = {group.get("min_dim_size_to_factor", 0), 0}
            return [lambda shape, least=least: dialect.axes(shape, least) for least in sides]  # type: ignore[misc]
        policies = POLICIES if policy is None and not dialect.held else [policy]
        known = (each for each in policies if callable(each) or each in POLICIES)
        return [partial(factoring.layout, factoring=each, name=name) for each in known]


def wide(value: Array) -> Array:
    """A statistic as a state holds it: float64 stays."""
    return value if value.dtype == np.float64 else value.astype(np.float32)


def estimate(parameter: Parameter) -> Array:
    """The second moment of every element, float64: row × column / mean (0 where the mean is 0), or as it is."""
    if not parameter.layout.factored:
        return np.asarray(parameter.slots["second_moment"], np.float64)
    layout = parameter.layout
    row = np.expand_dims(np.asarray(parameter.slots["row"], np.float64), layout.columns)
    column = np.expand_dims(np.asarray(parameter.slots["column"], np.float64), layout.rows)
    mean = row.mean(axis=layout.rows, keepdims=True)
    column = np.divide(column, mean, out=np.zeros(np.broadcast_shapes(column.shape, mean.shape)), where=mean != 0)
    product: Array = row * column
    return product


def fitted(parameter: Parameter, wanted: Layout, report: Report) -> Parameter:
    """The parameter with the statistics that another layout keeps. Needs memory for one parameter in float64.

    Raises:
        Refused: the shapes differ.
    """
    if wanted.shape != parameter.shape:
        remedy = "Name it after another parameter, or permute its axes, in a names file."
        raise Refused(
            message(f"the shape of {parameter.name}", f"{wanted.shape} as in the target", parameter.shape, remedy)
        )
    if parameter.layout.batch and not wanted.batch:
        report.note(
            "the target's file does not tell batch axes: tell its optimizer, or clipping and parameter scale are taken "
            "over whole parameters"
        )
    have, want = ({slot: its.keeps(slot) for slot in its.slots} for its in (parameter.layout, wanted))
    if have == want:
        report.changes.append(Change(parameter.name, "kept"))
        return replace(parameter, layout=wanted)
    slots = {name: value for name, value in parameter.slots.items() if name not in have}
    whole: Array | None = None
    for slot, axes in want.items():
        source = next((name for name in sorted(have, key=lambda n: len(have[n])) if set(axes) <= set(have[name])), None)
        if source is None:
            whole = estimate(parameter) if whole is None else whole
            value, origin = whole, tuple(range(len(wanted.shape)))
        else:
            value, origin = np.asarray(parameter.slots[source], np.float64), have[source]
        gone = tuple(place for place, axis in enumerate(origin) if axis not in axes)
        if not value.size:  # nothing has a mean
            value, gone = np.zeros([wanted.shape[axis] for axis in axes]), ()
        slots[slot] = (value.mean(axis=gone) if gone else value).astype(_dtype(parameter))
    new = replace(parameter, layout=wanted, slots=slots)
    swapped = sorted(have.values()) == sorted(want.values())
    how = "kept" if swapped else "means" if whole is None else "rebuilt"
    before = estimate(parameter) if whole is None else whole
    size = np.linalg.norm(before.ravel())
    moved = 0.0 if swapped or not size else float(np.linalg.norm((estimate(new) - before).ravel()) / size)
    report.changes.append(Change(parameter.name, how, moved))
    return new


def permuted(parameter: Parameter, permutation: Sequence[int], report: Report) -> Parameter:
    """The parameter with its axes in another order, as ``numpy.transpose`` has it. Rows stay before columns.

    An extra slot of another shape than the parameter's is left behind, and momentum that depends on one.
    """
    rank = len(parameter.shape)
    if sorted(permutation) != list(range(rank)):
        remedy = f"The shape of {parameter.name} is {parameter.shape}."
        raise Refused(message("permute", f"every axis from 0 to {rank - 1} once", list(permutation), remedy))
    place = {old: new for new, old in enumerate(permutation)}
    old = parameter.layout
    rows, columns, batch = (tuple(sorted(place[axis] for axis in axes)) for axes in (old.rows, old.columns, old.batch))
    new = Layout(tuple(old.shape[axis] for axis in permutation), rows, columns, batch)
    lost = [slot for slot, value in parameter.extra.items() if value.shape != parameter.shape]
    if parameter.momentum is not None and (parameter.momentum.shape != old.shape or "momentum_scale" in lost):
        lost.append("momentum")
    report.dropped(
        " and ".join(lost), [parameter.name] if lost else [], "its axes change places, and its blocks do not"
    )
    slots = {}
    for slot, value in parameter.slots.items():
        if slot not in lost:
            axes = old.keeps(slot)
            order = [axes.index(axis) for axis in permutation if axis in axes]
            slots[slot] = np.ascontiguousarray(value.transpose(order)) if order else value
    return rows_first(replace(parameter, layout=new, slots=slots))


def rows_first(parameter: Parameter) -> Parameter:
    """The parameter with row and column in each other's place where the columns come before the rows."""
    layout, slots = parameter.layout, parameter.slots
    if not layout.factored or min(layout.rows) < min(layout.columns):
        return parameter
    turned = replace(layout, rows=layout.columns, columns=layout.rows)
    return replace(parameter, layout=turned, slots={**slots, "row": slots["column"], "column": slots["row"]})


def roles(
    name: str,
    slots: Mapping[str, Shape],
    choose: Iterable[Chooser],
    *,
    shape: Shape | None = None,
    axes: Axes | None = None,
) -> Layout:
    """The layout of a parameter that a file tells the statistics of.

    Args:
        slots: shapes of ``row`` and ``column``, or of ``second_moment``.
        choose: what the writer may have used to choose the axes; empty if nobody knows.
        shape: the parameter's, where it is known.
        axes: the axes by name, where the user tells them; a user's word is final.

    Raises:
        Refused: the statistics do not tell the shape or the axes, or do not fit them.
    """
    if "second_moment" in slots:
        told = Layout(slots["second_moment"], (), ())
        if shape is not None and shape != told.shape:
            raise Refused(message(f"second_moment of {name}", f"of its shape {shape}", told.shape, "Check the shapes."))
        return told
    row, column = slots["row"], slots["column"]

    def fits(layout: Layout) -> bool:
        return layout.factored and layout.row_shape == row and layout.column_shape == column

    if axes is not None and name in axes:
        if shape is None:
            raise Refused(message(f"the shape of {name}", "told where its axes are", None, "Pass shapes as well."))
        spec = axes[name]
        told = factoring.layout(shape, lambda *_: spec, name=name)
        if not fits(told):
            rule = f"those of row {row} and column {column}"
            raise Refused(message(f"the axes of {name}", rule, spec, f"Its shape is {shape}."))
        return told
    shapes = [shape] if shape is not None else list(dict.fromkeys(_shapes(row, column)))
    chosen = {layout for chooser in choose for layout in map(chooser, shapes) if fits(layout)}
    if len(chosen) == 1:
        return chosen.pop()
    if shape is None:
        held = f"row {row} and column {column}"
        raise Refused(message(f"the shape of {name}", "told by its statistics", held, "Pass shapes (--shapes)."))
    candidates = list(chosen) or [layout for layout in _partitions(shape) if fits(layout)]
    if len(candidates) != 1:
        rule = f"told by row {row} and column {column} of shape {shape}"
        got = f"{len(candidates)} possible choices"
        raise Refused(message(f"the axes of {name}", rule, got, "Pass its axes (--axes), or check its shape."))
    return candidates[0]


def _shapes(row: Shape, column: Shape) -> Iterable[Shape]:
    """Shapes of parameters that could have these statistics: one axis each, or one cut of the shape in two."""
    if row and column:
        yield row + column
        yield column + row
    if len(row) == len(column) <= 16:
        for gone in range(len(row) + 1):
            for size in set(column):
                yield (*row[:gone], size, *row[gone:])


def _partitions(shape: Shape) -> Iterable[Layout]:
    """Every way to give each axis the role of row, column or neither, the first of rows and columns being a row."""
    if len(shape) > 8:
        return
    for given in itertools.product("rcb", repeat=len(shape)):
        rows = tuple(axis for axis, role in enumerate(given) if role == "r")
        columns = tuple(axis for axis, role in enumerate(given) if role == "c")
        if rows and columns:
            yield Layout(shape, rows, columns)


def rms_of(value: Array) -> float | None:
    """Root mean square of a parameter, ``None`` where it has none."""
    with np.errstate(invalid="ignore"):
        value = np.asarray(value, np.float64)
    if not value.size or not np.isfinite(value).all():
        return None
    return float(np.sqrt(np.mean(np.square(value))))


def _dtype(parameter: Parameter) -> Any:
    return next(iter(parameter.statistics.values())).dtype
