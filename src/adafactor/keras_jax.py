"""Keras variables on the JAX backend, handed to the kernels of the optax front end: all of them at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import keras

from adafactor.factoring import Layout
from adafactor.hyperparameters import Hyperparameters
from adafactor.kernels import array, xla
from adafactor.sharding import jax as shards


class Member(NamedTuple):
    """One variable of an update, as JAX arrays; ``sharding`` is that of its Keras distribution layout."""

    layout: Layout
    x: jax.Array
    g: jax.Array
    slots: dict[str, jax.Array]
    momentum: jax.Array | None
    weight_decay: float
    sharding: Any


class Moved(NamedTuple):
    x: jax.Array
    slots: dict[str, jax.Array]
    momentum: jax.Array | None


def step(
    members: Sequence[Member], hp: Hyperparameters, learning_rate: Any, iterations: Any, scheduled: bool
) -> list[Moved] | None:
    """The update of every member; ``None`` where it has to be made variable by variable."""
    t = (jnp.asarray(iterations) + 1).astype(jnp.result_type(float))
    rate = jnp.asarray(learning_rate, t.dtype)
    decay, rho = array.schedule(xla.ops, t, rate, hp, scheduled)
    tensors = [
        xla.Tensor(m.layout, m.x, m.g, m.slots, 1 - rate * m.weight_decay if m.weight_decay else 1.0, m.momentum)
        for m in members
    ]
    split = [member.sharding is not None and member.sharding.mesh.size > 1 for member in members]
    if not any(split):
        return [Moved(new.x, new.slots, new.momentum) for new in xla.step(tensors, hp, decay, rho, True)]
    if not all(split) or hp.momentum is not None:
        return None
    moved = []
    for tensor, found in zip(tensors, shards.measure(tensors, _shardings(members), hp, decay, rho, True), strict=True):
        g, second = xla.barrier(tensor.g, found.second)
        kept = tensor.x.astype(second.dtype) * jnp.asarray(tensor.keep, second.dtype)
        moved.append(
            Moved((kept - g.astype(second.dtype) * found.first * second).astype(tensor.x.dtype), found.slots, None)
        )
    return moved


def _shardings(members: Sequence[Member]) -> list[Any]:
    return [member.sharding for member in members]


def sharding_of(variable: Any) -> Any:
    """The ``NamedSharding`` that a Keras distribution gave the variable, or ``None``."""
    its_layout = getattr(variable, "_layout", None)
    if isinstance(its_layout, keras.distribution.TensorLayout):
        its_layout = its_layout.backend_layout
    return its_layout if isinstance(its_layout, jax.sharding.NamedSharding) else None
