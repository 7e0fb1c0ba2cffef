"""The transformation behind ``adafactor.optax``: pytrees in, tensors to the kernels, pytrees out."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from numbers import Integral
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.experimental.shard_alike import shard_alike

from adafactor.core import factoring, finish
from adafactor.core.errors import message
from adafactor.core.factoring import Factored, Layout, Rule, Shape, validate
from adafactor.core.hyperparameters import Hyperparameters, is_traced
from adafactor.engine.xla import arrays, primitives
from adafactor.engine.xla import sharded as shards
from adafactor.optax import state as states
from adafactor.optax.state import SLOTS, AdafactorState, Diagnostics
from adafactor.optax.trees import Tree, broadcast, flatten, is_function, paths, unflatten


@dataclass(frozen=True)
class Roles:
    """Decides the layout of every parameter of a tree. The arguments are those of ``adafactor.optax.adafactor``."""

    factoring: Any
    min_dim_size_to_factor: Any
    batch_axes: Any

    def __post_init__(self) -> None:
        if self._by_policy:
            validate(self.factoring, 1)
        if not is_traced(self.min_dim_size_to_factor):
            validate("last_two", _integer(self.min_dim_size_to_factor))

    @property
    def _by_policy(self) -> bool:
        """Whether one policy or callable decides for every parameter; else a tree has an entry for each."""
        return isinstance(self.factoring, str) or is_function(self.factoring, _is_spec)

    def of(self, tree: Tree, factored: Sequence[bool] | None = None) -> list[Layout | None]:
        """The layout of every leaf. ``factored`` says of each whether its state is, if there is a state."""
        leaves, _ = flatten(tree)
        batches = broadcast("batch_axes", self.batch_axes, tree, _is_axes)
        whole = [self.factoring] * len(leaves)
        rules = whole if self._by_policy else broadcast("factoring", self.factoring, tree, _is_spec)
        names = [""] * len(leaves) if all(isinstance(rule, str) for rule in rules) else _names(tree)
        layouts: list[Layout | None] = []
        for k, (leaf, batch, rule) in enumerate(zip(leaves, batches, rules, strict=True)):
            if leaf is None:
                layouts.append(None)
                continue
            name, shape = names[k], tuple(leaf.shape)
            batch = tuple(int(axis) for axis in ((batch,) if isinstance(batch, Integral) else batch))
            if isinstance(rule, str):
                least = self._least(None if factored is None else factored[k])
                layouts.append(factoring.layout(shape, rule, least, name=name, batch_axes=batch))  # type: ignore[arg-type]
            else:
                spec = rule(name, shape) if callable(rule) else rule
                if batch and (spec is None or isinstance(spec, Factored)):
                    spec = spec or Factored()
                    spec = dataclasses.replace(spec, batch=tuple({*spec.batch, *batch}))
                layouts.append(factoring.layout(shape, _always(spec), name=name))
        return layouts

    def _least(self, factored: bool | None) -> int:
        if not is_traced(self.min_dim_size_to_factor):
            return int(self.min_dim_size_to_factor)
        if factored is None:
            remedy = 'Call inject_hyperparams(adafactor, static_args="min_dim_size_to_factor").'
            raise TypeError(
                message("min_dim_size_to_factor", "known when state is made", self.min_dim_size_to_factor, remedy)
            )
        return 1 if factored else 1 << 62  # the state knows what was decided


@dataclass(frozen=True)
class Transformation:
    """Validated arguments of ``adafactor.optax.adafactor``, and the three functions."""

    hp: Hyperparameters
    roles: Roles
    learning_rate: Any
    weight_decay_rate: Any
    weight_decay_mask: Any
    decay_offset: Any
    momentum_dtype: Any
    shardings: Tree | None
    diagnostics: bool

    # -- state ---------------------------------------------------------------------------------------------------------

    def init(self, params: Tree) -> AdafactorState:
        leaves, treedef = flatten(params)
        layouts, placed = self.roles.of(params), self._placed(params)

        def zeros(name: str, dtype: Any = None) -> Tree:
            """A tree of zeros for every leaf that has something of this name."""
            made, removed = [], []
            for leaf, layout, sharding in zip(leaves, layouts, placed, strict=True):
                gone = None if layout is None else _removed(layout, name)
                removed.append(gone or ())
                made.append(None if gone is None else _zeros(leaf, dtype or _statistics_dtype(leaf), gone, sharding))
            return unflatten(treedef, made, removed)

        momentum = None if self.hp.momentum is None else zeros("momentum", self.momentum_dtype)
        diagnostics = Diagnostics(*(zeros("diagnostics") for _ in range(3))) if self.diagnostics else None
        count = jnp.zeros([], jnp.int32)
        mesh = next((sharding.mesh for sharding in placed if sharding is not None), None)
        if mesh is not None and not isinstance(mesh, jax.sharding.AbstractMesh):
            # where every later count will be
            count = jax.device_put(count, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()))
        return AdafactorState._make((count, *(zeros(name) for name in SLOTS), momentum, diagnostics))

    def _placed(self, params: Tree) -> list[Any]:
        """The sharding of every parameter over several devices, ``None`` where there is none or nobody knows."""
        if self.shardings is None:
            return [None if leaf is None else shards.of(leaf) for leaf in flatten(params)[0]]
        return broadcast("shardings", self.shardings, params, lambda value: isinstance(value, jax.sharding.Sharding))

    # -- update --------------------------------------------------------------------------------------------------------

    def update(
        self, updates: Tree, state: AdafactorState, params: Tree | None = None, **_: Any
    ) -> tuple[Tree, AdafactorState]:
        if params is None and (self.hp.scale_parameter or self.weight_decay_rate is not None):
            raise ValueError(message("params", "given to update", params, "Call update(grads, state, params)."))
        work = self._work(updates, state, params)
        new = list(work.grads)
        for k, tensor, moved in zip(work.where, work.tensors, self._moves(work, state), strict=True):
            new[k] = (-moved.loss).astype(tensor.x.dtype)
            work.take(k, moved)
        return work.treedef.unflatten(new), work.state()

    def step(self, params: Tree, grads: Tree, state: AdafactorState) -> tuple[Tree, AdafactorState]:
        work = self._work(grads, state, params)
        new = list(work.params)
        if self.hp.momentum is None and not any(work.placed):
            tensors = [
                tensor._replace(decay_factor=1.0 if work.decays[k] is None else 1 - work.decays[k])
                for k, tensor in zip(work.where, work.tensors, strict=True)
            ]
            stepped = primitives.step(tensors, self._settings(state))
            for k, (tensor, diagnostics) in zip(work.where, stepped, strict=True):
                new[k] = tensor.x
                work.take(k, _Move(None, tensor.slots, None, diagnostics))
            return work.treedef.unflatten(new), work.state()
        for k, tensor, moved in zip(work.where, work.tensors, self._moves(work, state), strict=True):
            new[k] = (tensor.x.astype(moved.loss.dtype) - moved.loss).astype(tensor.x.dtype)
            work.take(k, moved)
        return work.treedef.unflatten(new), work.state()

    def _moves(self, work: _Work, state: AdafactorState) -> list[_Move]:
        settings = self._settings(state)
        if any(work.placed):
            measured = shards.measure(work.tensors, [work.placed[k] for k in work.where], settings)
        else:
            measured = primitives.measure(work.tensors, settings)
        return [
            _move(tensor, each, work.decays[k], settings.hp.beta_1, self.momentum_dtype)
            for k, tensor, each in zip(work.where, work.tensors, measured, strict=True)
        ]

    def _settings(self, state: AdafactorState) -> arrays.Settings:
        t = jnp.maximum(state.count - jnp.asarray(self.decay_offset, jnp.int32) + 1, 1).astype(jnp.result_type(float))
        scheduled = callable(self.learning_rate)
        rho = _scalar("learning_rate", self.learning_rate(state.count)) if scheduled else self.learning_rate
        rho = jnp.asarray(1.0 if rho is None else rho, t.dtype)
        ema_weight, rho = arrays.schedule(primitives.ops, t, rho, self.hp, scheduled)
        return arrays.Settings(arrays.Constants.of(self.hp), ema_weight, rho, diagnostics=self.diagnostics)

    def effective_lr(self, params: Tree, state: AdafactorState) -> Tree:
        leaves, treedef = flatten(params)
        settings, layouts = self._settings(state), self.roles.of(params)

        def step_size(x: Any, layout: Layout) -> jax.Array:
            rho = jnp.asarray(settings.rho, _statistics_dtype(x))
            if not self.hp.scale_parameter:
                return rho
            axes = tuple(axis for axis in range(x.ndim) if axis not in layout.batch)
            Q = jnp.sum(jnp.square(x.astype(rho.dtype)), axes)
            scale = finish.parameter_scale(primitives.ops, Q, layout.slice_size, self.hp.epsilon_2)
            size: jax.Array = (rho * scale).reshape(-1 if layout.batch else ())
            return size

        pairs = zip(leaves, layouts, strict=True)
        return treedef.unflatten([None if layout is None else step_size(x, layout) for x, layout in pairs])

    def _decays(self, params: Tree, state: AdafactorState) -> list[Any]:
        """What every parameter loses of itself: ``None`` where it does not decay."""
        rate, mask = self.weight_decay_rate, self.weight_decay_mask
        if rate is None:
            return [None] * len(flatten(params)[0])
        rate = _scalar("weight_decay_rate", rate(state.count)) if callable(rate) else rate
        mask = mask(params) if is_function(mask) else mask
        chosen = broadcast("weight_decay_mask", True if mask is None else mask, params)
        return [rate if each else None for each in chosen]

    def _work(self, grads: Tree, state: AdafactorState, params: Tree | None) -> _Work:
        given = grads if params is None else params
        leaves, treedef = flatten(given)
        flat = states.of(state, given, self.hp.momentum is not None, self.diagnostics)
        layouts = self.roles.of(given, [row is not None for row in flat.slots["row"]])
        gradients = treedef.flatten_up_to(grads)
        where, tensors = [], []
        for k, (x, g, layout) in enumerate(zip(leaves, gradients, layouts, strict=True)):
            if layout is None:
                continue
            states.check(k, flat, layout, given)
            if g is not None and tuple(g.shape) != layout.shape:
                rule = f"of its parameter's shape {layout.shape}"
                raise ValueError(message("a gradient", rule, tuple(g.shape), "Reshape or sum it before the update."))
            if g is None or not layout.size:
                continue
            where.append(k)
            own = {name: jnp.asarray(flat.slots[name][k], _statistics_dtype(x)) for name in layout.slots}
            momentum = flat.momentum[k] if flat.momentum else None
            tensors.append(arrays.Tensor(layout, x, g, own, momentum=momentum))
        return _Work(treedef, leaves, gradients, tensors, where, self._decays(given, state), self._placed(given), flat)


class _Move(NamedTuple):
    """What the parameter loses, in the dtype of the statistics, and its new state."""

    loss: Any
    slots: dict[str, jax.Array]
    momentum: jax.Array | None
    diagnostics: jax.Array | None


@partial(primitives.compiled_alone, static=(4,))
def _move(tensor: arrays.Tensor, measured: primitives.Measured, decay: Any, beta_1: Any, momentum_dtype: Any) -> _Move:
    """``decay`` is what the parameter loses of itself, if anything."""
    update = measured.update
    first, second = update.direction
    g, second = primitives.barrier(tensor.g, second)
    loss = g.astype(second.dtype) * (first * update.alpha) * second
    average = None
    if tensor.momentum is not None:
        beta_1 = jnp.asarray(beta_1, loss.dtype)
        loss = beta_1 * tensor.momentum.astype(loss.dtype) + (1 - beta_1) * loss
        average = loss.astype(momentum_dtype)
    if decay is not None:
        loss = loss + jnp.asarray(decay, loss.dtype) * tensor.x.astype(loss.dtype)
    return _Move(loss, update.slots, average, measured.diagnostics)


@dataclass
class _Work:
    """The flat lists of one update. ``where`` has the places of the parameters that take part in it."""

    treedef: Any
    params: list[Any]
    grads: list[Any]
    tensors: list[arrays.Tensor]
    where: list[int]
    decays: list[Any]
    placed: list[Any]
    flat: states.Flat

    def take(self, k: int, move: _Move) -> None:
        for name, value in move.slots.items():
            self.flat.slots[name][k] = value
        if move.momentum is not None:
            self.flat.momentum[k] = move.momentum
        for number, values in enumerate(self.flat.diagnostics):
            assert move.diagnostics is not None
            values[k] = move.diagnostics[..., number]

    def state(self) -> AdafactorState:
        return self.flat.state(optax.safe_increment(self.flat.old.count))


def _removed(layout: Layout, name: str) -> Shape | None:
    """The parameter's axes that a part of the state lacks, ``None`` where there is no such part."""
    if name in SLOTS and name not in layout.slots:
        return None
    return layout.whole if name == "diagnostics" else layout.lacks(name)


def _zeros(leaf: Any, dtype: Any, removed: Shape, sharding: Any) -> jax.Array:
    """Zeros of the leaf's shape less the removed axes, where the leaf is, split as the leaf is."""
    shape = tuple(n for axis, n in enumerate(leaf.shape) if axis not in removed)
    if isinstance(leaf, jax.core.Tracer):
        if sharding is None:  # XLA decides where the leaf is: as it decides, so it shall for the zeros
            return jnp.sum(shard_alike(leaf, jnp.zeros(leaf.shape, dtype))[1], axis=removed)
        wanted = shards.reduced(sharding, len(leaf.shape), removed)
        if shards.explicit(sharding):
            return jnp.zeros(shape, dtype, out_sharding=wanted)
        zeros: jax.Array = jax.lax.with_sharding_constraint(jnp.zeros(shape, dtype), wanted)
        return zeros
    if sharding is not None:
        return jnp.zeros(shape, dtype, device=shards.reduced(sharding, len(leaf.shape), removed))
    return jnp.zeros(shape, dtype, device=leaf.sharding if getattr(leaf, "committed", False) else None)


def _statistics_dtype(leaf: Any) -> Any:
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
        remedy = "Leave others out with optax.masked or optax.partition; split complex ones into two."
        raise TypeError(message("every parameter", "of a real floating dtype", str(leaf.dtype), remedy))
    return jnp.dtype("float64" if leaf.dtype == jnp.float64 else "float32")


def _always(spec: Any) -> Rule:
    """The rule that gives one specification whatever it is asked."""
    return lambda name, shape: spec


def _names(tree: Tree) -> list[str]:
    return ["/".join(path) for path in paths(tree)]


def _scalar(argument: str, value: Any) -> Any:
    """What a schedule gave, as an array of shape ()."""
    if jnp.size(value) != 1:
        raise ValueError(message(argument, "a schedule of one number", jnp.shape(value), "Return a scalar."))
    return jnp.reshape(value, ())


def _is_axes(value: Any) -> bool:
    return isinstance(value, Integral) or (
        isinstance(value, tuple | list) and all(isinstance(axis, Integral) for axis in value)
    )


def _is_spec(value: Any) -> bool:
    return value is None or isinstance(value, Factored | str)


def _integer(value: Any) -> Any:
    """NumPy's and JAX's integers as Python's; anything else as it is, to be refused by name."""
    return int(value) if hasattr(value, "dtype") and jnp.issubdtype(value.dtype, jnp.integer) else value
