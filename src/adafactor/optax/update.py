"""The transformation behind ``adafactor.optax``: pytrees in, tensors to the kernels, pytrees out."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.experimental.shard_alike import shard_alike

from adafactor.core.errors import message
from adafactor.core.factoring import Factored, Layout, Rule, Shape, layout, validate
from adafactor.core.hyperparameters import Hyperparameters, is_traced
from adafactor.engine.xla import arrays, primitives
from adafactor.engine.xla import sharded as shards

Tree = Any  # a pytree, of what its context says

SLOTS = ("row", "column", "second_moment")


class Diagnostics(NamedTuple):
    """Of the last update, per parameter and per slice of its batch axes. Trees like the parameters'.

    Attributes:
        update_rms: root mean square of the normalised update before clipping (eq. 7). Its spikes precede those of
            the loss.
        clip_factor: what clipping divided the update by, at least 1 (eq. 10).
        parameter_scale: what the learning rate was multiplied by (eq. 9); 1 where that is off.
    """

    update_rms: Tree
    clip_factor: Tree
    parameter_scale: Tree


class AdafactorState(NamedTuple):
    """What Adafactor remembers. The trees have the structure of the parameters, with ``None`` for what does not exist.

    Attributes:
        count: int32[], the number of updates made.
        row, column: second-moment statistics of factored parameters, of the parameter's shape less its column axes
            or its row axes.
        second_moment: that of the other parameters, of the parameter's shape.
        momentum: average of the updates, or ``None`` without momentum.
        diagnostics: of the last update, with ``diagnostics=True``.

    Statistics are float32, float64 for a float64 parameter.
    """

    count: jax.Array  # type: ignore[assignment]  # as optax calls it, over tuple.count
    row: Tree
    column: Tree
    second_moment: Tree
    momentum: Tree
    diagnostics: Diagnostics | None = None


@dataclass(frozen=True)
class Roles:
    """Decides the layout of every parameter of a tree. The arguments are those of ``adafactor.optax.adafactor``."""

    factoring: Any
    min_dim_size_to_factor: Any
    batch_axes: Any

    def __post_init__(self) -> None:
        if isinstance(self.factoring, str) or callable(self.factoring):
            validate(self.factoring, 1)
        if not is_traced(self.min_dim_size_to_factor):
            validate("last_two", _integer(self.min_dim_size_to_factor))

    def of(self, tree: Tree, factored: Sequence[bool] | None = None) -> list[Layout]:
        """The layout of every leaf. ``factored`` says of each whether its state is, if there is a state."""
        paths = jax.tree_util.tree_flatten_with_path(tree)[0]
        batches = _broadcast(self.batch_axes, tree, _is_axes)
        by_policy = isinstance(self.factoring, str) or callable(self.factoring)
        rules = [self.factoring] * len(paths) if by_policy else _broadcast(self.factoring, tree, _is_spec)
        layouts = []
        for k, ((path, leaf), batch, rule) in enumerate(zip(paths, batches, rules, strict=True)):
            name, shape = jax.tree_util.keystr(path, simple=True, separator="/"), tuple(leaf.shape)
            batch = (batch,) if isinstance(batch, int) else tuple(batch)
            if isinstance(rule, str):
                least = self._least(None if factored is None else factored[k])
                layouts.append(layout(shape, rule, least, name=name, batch_axes=batch))  # type: ignore[arg-type]
            else:
                spec = rule(name, shape) if callable(rule) else rule
                if batch and (spec is None or isinstance(spec, Factored)):
                    spec = spec or Factored()
                    spec = dataclasses.replace(spec, batch=tuple({*spec.batch, *batch}))
                layouts.append(layout(shape, _always(spec), name=name))
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
        leaves, treedef = _flatten(params)
        layouts, placed = self.roles.of(params), self._placed(params)
        trees: dict[str, list[Any]] = {name: [None] * len(leaves) for name in SLOTS}
        for k, (leaf, its_layout) in enumerate(zip(leaves, layouts, strict=True)):
            gone = {"row": its_layout.columns, "column": its_layout.rows}
            for name in its_layout.slots:
                trees[name][k] = _zeros(leaf, _statistics_dtype(leaf), gone.get(name, ()), placed[k])
        momentum = None
        if self.hp.momentum is not None:
            momentum = treedef.unflatten(
                [_zeros(leaf, self.momentum_dtype, (), sharding) for leaf, sharding in zip(leaves, placed, strict=True)]
            )
        diagnostics = None
        if self.diagnostics:
            reports = [
                _zeros(leaf, _statistics_dtype(leaf), its_layout.whole, sharding)
                for leaf, its_layout, sharding in zip(leaves, layouts, placed, strict=True)
            ]
            diagnostics = Diagnostics(*(treedef.unflatten([jnp.copy(a) for a in reports]) for _ in range(3)))
        count = jnp.zeros([], jnp.int32)
        mesh = next((sharding.mesh for sharding in placed if sharding is not None), None)
        if mesh is not None and not isinstance(mesh, jax.sharding.AbstractMesh):
            # where every later count will be
            count = jax.device_put(count, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()))
        statistics = (treedef.unflatten(trees[name]) for name in SLOTS)
        return AdafactorState._make((count, *statistics, momentum, diagnostics))

    def _placed(self, params: Tree) -> list[Any]:
        """The sharding of every parameter over several devices, ``None`` where there is none or nobody knows."""
        if self.shardings is None:
            return [shards.of(leaf) for leaf in jax.tree.leaves(params)]
        return _broadcast(self.shardings, params, lambda value: isinstance(value, jax.sharding.Sharding))

    # -- update --------------------------------------------------------------------------------------------------------

    def update(
        self, updates: Tree, state: AdafactorState, params: Tree | None = None, **_: Any
    ) -> tuple[Tree, AdafactorState]:
        if params is None and (self.hp.scale_parameter or self.weight_decay_rate is not None):
            raise ValueError(message("params", "given to update", params, "Call update(grads, state, params)."))
        work = self._work(updates, state, params)
        found = self._measure(work, state)
        new = list(work.grads)
        for k, tensor, measured in zip(work.where, work.tensors, found, strict=True):
            loss, average = self._loss(tensor, measured, work.decays[k])
            new[k] = (-loss).astype(tensor.x.dtype)
            work.keep(k, measured.slots, average, measured.report)
        return work.treedef.unflatten(new), work.state()

    def step(self, params: Tree, grads: Tree, state: AdafactorState) -> tuple[Tree, AdafactorState]:
        work = self._work(grads, state, params)
        new = list(work.params)
        if self.hp.momentum is None and not any(work.placed) and not self.diagnostics:
            decay, rho = self._numbers(state)
            tensors = [
                tensor._replace(keep=1 - work.decays[k]) for k, tensor in zip(work.where, work.tensors, strict=True)
            ]
            for k, tensor in zip(work.where, primitives.step(tensors, self.hp, decay, rho), strict=True):
                new[k] = tensor.x
                work.keep(k, tensor.slots)
            return work.treedef.unflatten(new), work.state()
        found = self._measure(work, state)
        for k, tensor, measured in zip(work.where, work.tensors, found, strict=True):
            loss, average = self._loss(tensor, measured, work.decays[k])
            new[k] = (tensor.x.astype(loss.dtype) - loss).astype(tensor.x.dtype)
            work.keep(k, measured.slots, average, measured.report)
        return work.treedef.unflatten(new), work.state()

    def _numbers(self, state: AdafactorState) -> tuple[jax.Array, jax.Array]:
        """1 - beta(t) and rho(t) (eqs. 1 and 8)."""
        t = jnp.maximum(state.count - jnp.asarray(self.decay_offset, jnp.int32) + 1, 1).astype(jnp.result_type(float))
        scheduled = callable(self.learning_rate)
        rho = self.learning_rate(state.count) if scheduled else self.learning_rate
        rho = jnp.asarray(1.0 if rho is None else rho, t.dtype)
        return arrays.schedule(primitives.ops, t, rho, self.hp, scheduled)

    def _decays(self, params: Tree, state: AdafactorState) -> list[Any]:
        """What every parameter loses of itself: 0 where it does not decay."""
        leaves = jax.tree.leaves(params)
        rate, mask = self.weight_decay_rate, self.weight_decay_mask
        if rate is None:
            return [0] * len(leaves)
        rate = rate(state.count) if callable(rate) else rate
        mask = mask(params) if callable(mask) else mask
        return [rate if chosen else 0 for chosen in (_broadcast(True if mask is None else mask, params, None))]

    def _work(self, grads: Tree, state: AdafactorState, params: Tree | None) -> _Work:
        given = grads if params is None else params
        leaves, treedef = _flatten(given)
        slots = {name: treedef.flatten_up_to(getattr(state, name)) for name in SLOTS}
        layouts = self.roles.of(given, [row is not None for row in slots["row"]])
        flat = treedef.flatten_up_to(grads)
        momentum = [None] * len(leaves) if self.hp.momentum is None else treedef.flatten_up_to(state.momentum)
        where, tensors = [], []
        for k, (x, g, its_layout) in enumerate(zip(leaves, flat, layouts, strict=True)):
            if g is not None and tuple(g.shape) != its_layout.shape:
                rule = f"of its parameter's shape {its_layout.shape}"
                raise ValueError(message("a gradient", rule, tuple(g.shape), "Reshape or sum it before the update."))
            if g is None or not its_layout.size:
                continue
            where.append(k)
            own = {name: slots[name][k] for name in its_layout.slots}
            tensors.append(primitives.Tensor(its_layout, x, g, own, momentum=momentum[k]))
        decays = self._decays(given, state)
        reports = [treedef.flatten_up_to(tree) for tree in state.diagnostics or ()]
        return _Work(
            treedef, leaves, flat, tensors, where, decays, self._placed(given), slots, momentum, reports, state
        )

    def _measure(self, work: _Work, state: AdafactorState) -> list[primitives.Measured]:
        decay, rho = self._numbers(state)
        if not any(work.placed):
            return primitives.measure(work.tensors, self.hp, decay, rho, report=self.diagnostics)
        placed = [work.placed[k] for k in work.where]
        return shards.measure(work.tensors, placed, self.hp, decay, rho, report=self.diagnostics)

    def _loss(
        self, tensor: primitives.Tensor, measured: primitives.Measured, decay: Any
    ) -> tuple[jax.Array, jax.Array | None]:
        """What the parameter loses, in the dtype of the statistics, and the new momentum."""
        g, second = primitives.barrier(tensor.g, measured.second)
        loss = g.astype(second.dtype) * measured.first * second
        average = None
        if tensor.momentum is not None:
            beta_1 = jnp.asarray(self.hp.momentum, loss.dtype)
            loss = beta_1 * tensor.momentum.astype(loss.dtype) + (1 - beta_1) * loss
            average = loss.astype(self.momentum_dtype)
        if not (isinstance(decay, int) and decay == 0):
            loss = loss + jnp.asarray(decay, loss.dtype) * tensor.x.astype(loss.dtype)
        return loss, average


@dataclass
class _Work:
    """The flat lists of one update. ``where`` has the places of the parameters that take part in it."""

    treedef: Any
    params: list[Any]
    grads: list[Any]
    tensors: list[primitives.Tensor]
    where: list[int]
    decays: list[Any]
    placed: list[Any]
    slots: dict[str, list[Any]]
    momentum: list[Any]
    reports: list[list[Any]]
    old: AdafactorState

    def keep(
        self,
        k: int,
        slots: dict[str, jax.Array],
        momentum: jax.Array | None = None,
        report: jax.Array | None = None,
    ) -> None:
        for name, value in slots.items():
            self.slots[name][k] = value
        self.momentum[k] = momentum
        for number, values in enumerate(self.reports):
            assert report is not None
            values[k] = report[..., number]

    def state(self) -> AdafactorState:
        trees = (self.treedef.unflatten(self.slots[name]) for name in SLOTS)
        momentum = None if self.old.momentum is None else self.treedef.unflatten(self.momentum)
        diagnostics = Diagnostics(*map(self.treedef.unflatten, self.reports)) if self.reports else None
        return AdafactorState._make((optax.safe_increment(self.old.count), *trees, momentum, diagnostics))


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


def _flatten(tree: Tree, is_leaf: Any = None) -> tuple[list[Any], Any]:
    return jax.tree.flatten(tree, is_leaf=is_leaf)


def _broadcast(prefix: Tree, tree: Tree, is_leaf: Any) -> list[Any]:
    """The leaves of a prefix of the tree, one for every leaf of the tree."""
    leaves, treedef = _flatten(prefix, is_leaf)
    subtrees = treedef.flatten_up_to(tree)
    return [leaf for leaf, subtree in zip(leaves, subtrees, strict=True) for _ in jax.tree.leaves(subtree)]


def _is_axes(value: Any) -> bool:
    return isinstance(value, int) or (isinstance(value, tuple | list) and all(isinstance(axis, int) for axis in value))


def _is_spec(value: Any) -> bool:
    return value is None or isinstance(value, Factored)


def _integer(value: Any) -> Any:
    """NumPy's and JAX's integers as Python's; anything else as it is, to be refused by name."""
    return int(value) if hasattr(value, "dtype") and jnp.issubdtype(value.dtype, jnp.integer) else value
