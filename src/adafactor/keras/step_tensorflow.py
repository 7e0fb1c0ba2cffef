"""The step on the TensorFlow backend: the native op in graphs and eagerly, and in XLA the native measure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
import tensorflow as tf
from keras import ops

from adafactor.core.hyperparameters import Hyperparameters
from adafactor.engine.tensorflow import op, xla
from adafactor.engine.xla import arrays
from adafactor.keras.step import Member, array_ops, assign
from adafactor.keras.variables import dense

#: Numbers from which a variable has an op of its own. The small ones share one; in one op for all, the first gradient
#: would wait for the last.
LARGE = 65_536


@tf.autograph.experimental.do_not_convert
def update(
    optimizer: keras.optimizers.Optimizer,
    members: Sequence[Member],
    hp: Hyperparameters,
    learning_rate: Any,
    iterations: Any,
    scheduled: bool,
) -> list[Member]:
    """Update members through ``optimizer.assign``; returns those, untouched, that the op cannot take."""
    taken, others = list[Member](), list[Member]()
    for member in members:
        (taken if why_not(member) is None else others).append(member)
    if not taken:
        return others
    rate = tf.cast(ops.convert_to_tensor(learning_rate), tf.float64)
    t = tf.cast(ops.convert_to_tensor(iterations), tf.float64) + 1
    numbers = rate, *arrays.schedule(ops, t, rate, hp, scheduled)
    step = _step_in_xla if op.in_xla() else op.step
    for group in _groups(taken):
        with tf.device(_native(group[0].variable).device):
            results = step([_operand(member) for member in group], hp, *numbers)
        for member, result in zip(group, results, strict=True):
            assign(optimizer, member, result, result.diagnostics)
    return others


def _step_in_xla(operands: Sequence[op.Operand], hp: Hyperparameters, *numbers: Any) -> list[op.Result]:
    """`op.step`, of which XLA makes what follows measure."""
    results = []
    for o, (decay_factor, out, diagnostics) in zip(operands, xla.measure(operands, hp, *numbers), strict=True):
        tensor = arrays.Tensor(o.layout, o.x, o.g, o.slots, decay_factor, o.momentum)
        update = arrays.measured(array_ops, tensor, out, hp.epsilon_1)
        moved = arrays.apply(array_ops, tensor, update, hp.momentum)
        results.append(op.Result(moved.x, moved.slots, moved.momentum, diagnostics))
    return results


def distributed() -> bool:
    """Whether a ``tf.distribute`` strategy is at work, which reduces gradients and updates copies by itself."""
    return bool(tf.distribute.has_strategy())


def why_not(member: Member) -> str | None:
    """One sentence that says why a variable is updated by TensorFlow's own operations, or ``None``."""
    variable = _native(member.variable)
    if isinstance(variable, tf.distribute.DistributedValues):
        return "It has a copy on every device of a tf.distribute strategy, and this step is outside of it."
    if reason := op.why_not_here(variable.device, member.layout, _dtypes(member)):
        return reason
    return xla.why_not() if op.in_xla() else None


def _native(variable: Any) -> Any:
    return variable.value if isinstance(variable, keras.Variable) else variable


def _dtypes(member: Member) -> tuple[str, str]:
    x, g = (keras.backend.standardize_dtype(a.dtype) for a in (member.variable, member.gradient))
    return x, g


def _groups(members: Sequence[Member]) -> list[list[Member]]:
    """The members of each op."""
    groups: dict[Any, list[Member]] = {}
    for member in members:
        alone = member.position if member.layout.size >= LARGE else None
        key = alone, _native(member.variable).device, _dtypes(member)
        groups.setdefault(key, []).append(member)
    return list(groups.values())


def _operand(member: Member) -> op.Operand:
    return op.Operand(
        member.layout,
        _value(member.variable),
        dense(member.gradient, member.variable),
        {name: _value(slot) for name, slot in member.slots.items()},
        None if member.momentum is None else _value(member.momentum),
        None if member.diagnostics is None else _value(member.diagnostics),
        member.weight_decay,
    )


def _value(variable: Any) -> Any:
    return tf.convert_to_tensor(_native(variable))
