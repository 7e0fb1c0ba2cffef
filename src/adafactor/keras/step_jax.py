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
from adafactor.keras.step import Member


def update(
    optimizer: keras.optimizers.Optimizer,
    members: Sequence[Member],
    hp: Hyperparameters,
    learning_rate: Any,
    iterations: Any,
    scheduled: bool,
) -> bool:
    """Update every member through ``optimizer.assign``; False, and nothing done, where it has to be one by one.

    Only measure is a kernel's. XLA moves the parameters itself: a custom call that writes them in place would have it
    copy every one of them first, because the gradients read them too.
    """
    if not members:
        return True
    if hp.momentum is not None or any(member.sparse for member in members):
        return False
    t = (jnp.asarray(ops.convert_to_tensor(iterations)) + 1).astype(jnp.result_type(float))
    rate = jnp.asarray(ops.convert_to_tensor(learning_rate), t.dtype)
    decay, rho = arrays.schedule(primitives.ops, t, rate, hp, scheduled)
    report = any(member.report is not None for member in members)
    tensors = [_tensor(member, rate) for member in members]
    shardings = [_sharding_of(member.variable) for member in members]
    split = [sharding is not None and sharding.mesh.size > 1 for sharding in shardings]
    if all(split):
        measured = shards.measure(tensors, shardings, hp, decay, rho, True, report)
    elif not any(split):
        measured = primitives.measure(tensors, hp, decay, rho, True, report)
    else:
        return False
    for member, tensor, found in zip(members, tensors, measured, strict=True):
        g, second = primitives.barrier(tensor.g, found.second)
        kept = tensor.x.astype(second.dtype) * jnp.asarray(tensor.keep, second.dtype)
        moved = kept - g.astype(second.dtype) * found.first * second
        optimizer.assign(member.variable, moved.astype(tensor.x.dtype))
        for name, slot in member.slots.items():
            optimizer.assign(slot, found.slots[name])
        if found.report is not None:
            optimizer.assign(member.report, found.report)
    return True


def _tensor(member: Member, rate: jax.Array) -> primitives.Tensor:
    return primitives.Tensor(
        member.layout,
        ops.convert_to_tensor(member.variable),
        ops.convert_to_tensor(member.gradient, sparse=False),
        {name: ops.convert_to_tensor(slot) for name, slot in member.slots.items()},
        1 - rate * member.weight_decay if member.weight_decay else 1.0,
        None,
    )


def _sharding_of(variable: Any) -> Any:
    """The ``NamedSharding`` that a Keras distribution gave the variable, or ``None``."""
    its_layout = getattr(variable, "_layout", None)
    if isinstance(its_layout, keras.distribution.TensorLayout):
        its_layout = its_layout.backend_layout
    return its_layout if isinstance(its_layout, jax.sharding.NamedSharding) else None
