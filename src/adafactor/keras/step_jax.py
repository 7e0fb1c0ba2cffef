"""The step on the JAX backend: all variables of an update at once go to the kernels of the optax front end."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import keras
from keras import ops

from adafactor.core.hyperparameters import Hyperparameters
from adafactor.engine.xla import arrays, primitives
from adafactor.engine.xla import sharded as shards
from adafactor.keras.step import Member, assign, operand


def update(
    optimizer: keras.optimizers.Optimizer,
    members: Sequence[Member],
    hp: Hyperparameters,
    learning_rate: Any,
    iterations: Any,
    scheduled: bool,
) -> bool:
    """Update every member through ``optimizer.assign``; False, and nothing done, where it has to be one by one.

    The kernels move the parameters in place. Where somebody reads the old value beside the new one, that would cost
    a copy more than XLA's own moving does: then they measure, and XLA moves.
    """
    if not members:
        return True
    if any(member.sparse for member in members):
        return False
    t = (jnp.asarray(ops.convert_to_tensor(iterations)) + 1).astype(jnp.result_type(float))
    rate = jnp.asarray(ops.convert_to_tensor(learning_rate), t.dtype)
    ema_weight, rho = arrays.schedule(primitives.ops, t, rate, hp, scheduled)
    asked = any(member.diagnostics is not None for member in members)
    settings = arrays.Settings(arrays.Constants.of(hp), ema_weight, rho, True, asked)
    tensors = [operand(member, rate) for member in members]
    shardings = [_sharding_of(member.variable) for member in members]
    split = [sharding is not None and sharding.mesh.size > 1 for sharding in shardings]
    if any(split) and not all(split):
        return False
    if any(split):
        measured = shards.measure(tensors, shardings, settings)
    elif optimizer.gradient_accumulation_steps:  # Keras chooses between the new values and the old ones afterwards
        measured = primitives.measure(tensors, settings)
    else:
        measured = None
    if measured is None:
        moved = primitives.step(tensors, settings)
    else:
        moved = [
            (arrays.apply(primitives.ops, tensor, each.update, hp.momentum), each.diagnostics)
            for tensor, each in zip(tensors, measured, strict=True)
        ]
    for member, (tensor, diagnostics) in zip(members, moved, strict=True):
        assign(optimizer, member, tensor, diagnostics)
    return True


def _sharding_of(variable: Any) -> Any:
    """The ``NamedSharding`` that a Keras distribution gave the variable, or ``None``."""
    layout = getattr(variable, "_layout", None)
    if isinstance(layout, keras.distribution.TensorLayout):
        layout = layout.backend_layout
    return layout if isinstance(layout, jax.sharding.NamedSharding) else None
