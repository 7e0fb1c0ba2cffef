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

    array_ops = primitives.ops
else:
    array_ops = arrays.functions(ops)


class Member(NamedTuple):
    """One variable of an update.

    Attributes:
        position: the variable's, among those the optimizer was built on.
        variable, gradient: the variable and its gradient, dense or sparse.
        layout: the role of every axis; the variable has elements.
        slots, momentum, diagnostics: the optimizer's variables for it; no momentum and no diagnostics are ``None``.
        weight_decay: 0 where it does not decay.
    """

    position: int
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


def operand(member: Member, learning_rate: Any) -> arrays.Tensor:
    """A member's arrays; a sparse gradient is dense in the statistics."""
    return arrays.Tensor(
        member.layout,
        ops.convert_to_tensor(member.variable),
        dense(member.gradient, member.variable),
        {name: ops.convert_to_tensor(slot) for name, slot in member.slots.items()},
        1 - learning_rate * member.weight_decay if member.weight_decay else 1.0,
        None if member.momentum is None else ops.convert_to_tensor(member.momentum),
    )


def assign(optimizer: keras.optimizers.Optimizer, member: Member, moved: Any, diagnostics: Any) -> None:
    """Set a member's variables, through ``optimizer.assign``, to the ``x``, ``slots`` and ``momentum`` of ``moved``."""
    optimizer.assign(member.variable, moved.x)
    assign_state(optimizer, member, moved, diagnostics)


def assign_state(optimizer: keras.optimizers.Optimizer, member: Member, moved: Any, diagnostics: Any) -> None:
    """`assign`, all but the variable itself."""
    for name, slot in member.slots.items():
        optimizer.assign(slot, moved.slots[name])
    if member.momentum is not None:
        optimizer.assign(member.momentum, moved.momentum)
    if member.diagnostics is not None:
        optimizer.assign(member.diagnostics, diagnostics)


def update_one(
    optimizer: keras.optimizers.Optimizer, member: Member, learning_rate: Any, hp: Hyperparameters, scheduled: bool
) -> None:
    """Update the member's variable and state (``docs/algorithm.md``, eqs. 1 to 13), through ``optimizer.assign``."""
    variable, layout, dtype = member.variable, member.layout, statistics_dtype(member.variable)
    asked = member.diagnostics is not None
    with _no_grad():
        t = ops.cast(optimizer.iterations + 1, dtype)
        learning_rate = ops.cast(learning_rate, dtype)
        numbers = arrays.schedule(array_ops, t, learning_rate, hp, scheduled)
        settings = arrays.Settings(arrays.Constants.of(hp), *numbers, scale_after_decay=True, diagnostics=asked)
        tensor = operand(member, learning_rate)
        update = arrays.measure(array_ops, tensor, settings)
        diagnostics = arrays.diagnosed(array_ops, update, layout) if asked else None
        if not member.sparse:
            assign(optimizer, member, arrays.apply(array_ops, tensor, update, hp.momentum), diagnostics)
            return
        first, second = update.direction
        if member.weight_decay:
            optimizer.assign(variable, ops.cast(ops.cast(tensor.x, dtype) * tensor.decay_factor, variable.dtype))
        scale = ops.broadcast_to(first * (second * update.alpha), layout.shape)
        step = ops.multiply(ops.cast(member.gradient, dtype), scale)  # sparse like the gradient
        optimizer.assign_sub(variable, ops.cast(step, variable.dtype))
        assign_state(optimizer, member, tensor._replace(slots=update.slots), diagnostics)


def _no_grad() -> contextlib.AbstractContextManager[Any]:
    if keras.backend.backend() != "torch":
        return contextlib.nullcontext()
    import torch

    return torch.no_grad()
