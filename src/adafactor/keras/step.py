"""One update of one variable in Keras's own operations: TensorFlow, and what the other backends' kernels leave over."""

from __future__ import annotations

import contextlib
from typing import Any, NamedTuple

import keras
from keras import ops

from adafactor.core.factoring import Layout
from adafactor.core.hyperparameters import Hyperparameters
from adafactor.engine.xla import arrays
from adafactor.keras.variables import dense, is_sparse, statistics_dtype

if keras.backend.backend() == "jax":
    from adafactor.engine.xla import primitives

    _ops = primitives.ops
else:
    _ops = arrays.functions(ops)


class Member(NamedTuple):
    """One variable of an update.

    Attributes:
        place: the variable's place among those the optimizer was built on.
        variable, gradient: the variable and its gradient, dense or sparse.
        layout: the role of every axis; the variable has elements.
        slots, momentum, diagnostics: the optimizer's variables for it; no momentum and no diagnostics are ``None``.
        weight_decay: 0 where it does not decay.
    """

    place: int
    variable: Any
    gradient: Any
    layout: Layout
    slots: dict[str, Any]
    momentum: Any
    diagnostics: Any
    weight_decay: float

    @property
    def sparse(self) -> bool:
        """Whether the update touches only some rows: a sparse gradient, and no momentum that moves the others."""
        return is_sparse(self.gradient) and self.momentum is None


def update_one(
    optimizer: keras.optimizers.Optimizer, member: Member, learning_rate: Any, hp: Hyperparameters, scheduled: bool
) -> None:
    """Update the member's variable and state (``docs/algorithm.md``, eqs. 1 to 13), through ``optimizer.assign``."""
    variable, layout = member.variable, member.layout
    dtype = statistics_dtype(variable)
    with _no_grad():
        x = ops.convert_to_tensor(variable)
        # A sparse gradient is dense in the statistics and stays sparse in the variable's update.
        g = dense(member.gradient, variable)
        t = ops.cast(optimizer.iterations + 1, dtype)
        learning_rate = ops.cast(learning_rate, dtype)
        numbers = arrays.schedule(_ops, t, learning_rate, hp, scheduled)
        settings = arrays.Settings(
            arrays.Constants.of(hp), *numbers, scale_after_decay=True, diagnostics=member.diagnostics is not None
        )
        tensor = arrays.Tensor(
            layout,
            x,
            g,
            {name: ops.convert_to_tensor(slot) for name, slot in member.slots.items()},
            1 - learning_rate * member.weight_decay if member.weight_decay else 1.0,
            None if member.momentum is None else ops.convert_to_tensor(member.momentum),
        )
        update = arrays.measure(_ops, tensor, settings)
        if member.sparse:
            first, second = update.direction
            if member.weight_decay:
                optimizer.assign(variable, ops.cast(ops.cast(x, dtype) * tensor.decay_factor, variable.dtype))
            scale = ops.broadcast_to(first * (second * update.alpha), layout.shape)
            step = ops.multiply(ops.cast(member.gradient, dtype), scale)
            optimizer.assign_sub(variable, ops.cast(step, variable.dtype))
        else:
            moved = arrays.apply(_ops, tensor, update, hp.momentum)
            optimizer.assign(variable, moved.x)
            if member.momentum is not None:
                optimizer.assign(member.momentum, moved.momentum)
        for name, slot in member.slots.items():
            optimizer.assign(slot, update.slots[name])
        if update.diagnostics is not None:
            shape = ops.shape(update.diagnostics[0])
            columns = [ops.broadcast_to(ops.cast(column, dtype), shape) for column in update.diagnostics]
            optimizer.assign(member.diagnostics, ops.reshape(ops.stack(columns, axis=-1), member.diagnostics.shape))


def _no_grad() -> contextlib.AbstractContextManager[Any]:
    if keras.backend.backend() != "torch":
        return contextlib.nullcontext()
    import torch

    return torch.no_grad()
