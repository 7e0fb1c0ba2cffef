"""Which position of an optimizer that Keras saved is what: Keras keys its variables by position, and names nothing."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from adafactor.convert.axes import Axes
from adafactor.convert.state import Array
from adafactor.core import factoring
from adafactor.core.dialects import FORMATS, OUR_KERAS, keras_order
from adafactor.core.errors import Refused, message
from adafactor.core.factoring import Factored, Layout, Shape

#: Slots for what Keras's base class keeps of every variable.
AVERAGE, ACCUMULATOR = "average", "gradient_accumulator"
STEPS = "gradient_accumulation_steps"


@dataclass
class Saved:
    """The optimizer part of a live optimizer or a file: arrays by position, and what is known of them."""

    format: str
    values: list[Array]
    config: dict[str, Any]
    variables: list[tuple[str, Shape]] | None = None
    known: list[tuple[str, float | None]] = field(default_factory=list)  # dtype and RMS of every variable


@dataclass
class Member:
    """A trainable variable, and the positions of its state."""

    name: str
    layout: Layout
    slots: dict[str, int]


@dataclass
class Order:
    """Which position is what."""

    members: list[Member]
    learning_rate: int | None


def order_of(saved: Saved, axes: Axes | None) -> Order:
    """Which position is what: the one reading that fits every shape.

    Raises:
        Refused: no reading fits, or several do.
    """
    orders = list(_orders(saved, axes))
    if not orders and saved.format == OUR_KERAS and saved.variables is None:
        remedy = "Pass the shapes of the model's trainable variables, in order (--shapes)."
        raise Refused(message("a file of adafactor.keras without a model", "read with shapes", None, remedy))
    if len(orders) != 1:
        remedy = f"Check the shapes and their order; tell use_ema, {STEPS} and factoring (--set), or --axes."
        got = f"{len(orders)} of them"
        raise Refused(
            message(f"the {len(saved.values)} variables of the optimizer", "readable in one way", got, remedy)
        )
    return orders[0]


def _orders(saved: Saved, axes: Axes | None) -> Iterator[Order]:
    config = saved.config
    # Options that the configuration does not tell are tried.
    rates = [0, 1] if "learning_rate" not in config else [int(isinstance(config["learning_rate"], int | float))]
    averages = [0, 1] if "use_ema" not in config else [int(bool(config["use_ema"]))]
    accumulators = [int(bool(config[STEPS]))] if STEPS in config else [0, 1]
    momenta = [0, 1] if "beta_1" not in config else [int(bool(config["beta_1"]))]
    variables, dialect = saved.variables, FORMATS[saved.format]
    if dialect.momentum_of is None:
        momenta = [0]
    if dialect.axes is not None and variables is None:
        variables = _shapes_of_theirs(saved.values)
    if variables is None:
        return
    for rate, average, accumulator, momentum in itertools.product(rates, averages, accumulators, momenta):
        order = Order([], 1 if rate else None)
        position = 1 + rate
        extra: list[dict[str, int]] = [{} for _ in variables]
        for slot, there in ((AVERAGE, average), (ACCUMULATOR, accumulator)):
            for index in range(len(variables) if there else 0):
                extra[index][slot] = position
                position += 1
        for (name, shape), slots in zip(variables, extra, strict=True):
            layout = _layout(config, name, shape, axes) if dialect.axes is None else dialect.axes(shape, 0)
            words = keras_order(saved.format, layout, bool(momentum))
            own = {slot: position + offset for offset, slot in enumerate(words) if slot in layout.slots}
            own |= {"momentum": position + words.index("momentum")} if momentum else {}
            position += len(words)
            order.members.append(Member(name, layout, {**own, **slots}))
        if position == len(saved.values) and _fits(order, saved.values):
            yield order


def _fits(order: Order, values: Sequence[Array]) -> bool:
    if values[0].shape != () or (order.learning_rate is not None and values[1].shape != ()):
        return False
    for member in order.members:
        shapes = {**member.layout.slots}
        if any(values[at].shape != shapes.get(slot, member.layout.shape) for slot, at in member.slots.items()):
            return False
    return True


def _shapes_of_theirs(values: Sequence[Array]) -> list[tuple[str, Shape]] | None:
    """From the end backwards: r, c and velocity tell the shape of their variable."""
    shapes: list[Shape] = []
    end = len(values)
    while end >= 3:
        row, column, velocity = values[end - 3 : end]
        shape = velocity.shape
        if len(shape) >= 2:
            fits = row.shape == shape[:-1] and column.shape == (*shape[:-2], shape[-1])
        else:
            fits = row.shape == column.shape == () and row.dtype.kind == column.dtype.kind == "i"
        if not fits or (end == 3 and not shape):
            break
        shapes.insert(0, shape)
        end -= 3
    return [(str(number), shape) for number, shape in enumerate(shapes)] or None


def _layout(config: Mapping[str, Any], name: str, shape: Shape, axes: Axes | None) -> Layout:
    if axes is not None and name in axes:
        return factoring.layout(shape, lambda *_: axes[name] or Factored(), name=name)
    policy = config.get("factoring", "last_two")
    if isinstance(policy, Mapping):
        remedy = "Pass its axes (--axes), or a live optimizer."
        raise Refused(message(f"the axes of {name}", "told by a policy's name", "a function", remedy))
    return factoring.layout(shape, policy, config.get("min_dim_size_to_factor", 1), name=name)
