"""Measure over the shards of a JAX mesh, with the sums of the whole model packed into one all-reduce.

GSPMD would partition the single-device step as well, and exactly, with an all-reduce for every sum of every matrix.
Here every parameter measures its own shard and stops where sums have to be completed; the driver packs the sums
of all parameters that wait for the same devices. A matrix split along one axis waits once, for all its sums
(eq. 7 needs no second read); split along both, three times.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from adafactor.core.errors import message
from adafactor.core.factoring import Layout, Shape
from adafactor.engine.xla import arrays
from adafactor.engine.xla.arrays import Settings, Tensor
from adafactor.engine.xla.primitives import Measured, ops

MeshAxes = tuple[str, ...]


def of(x: Any) -> NamedSharding | None:
    """The sharding of ``x`` over several devices, if it is known: of an array, or of a traced one on Explicit axes."""
    traced = isinstance(x, jax.core.Tracer)
    sharding = jax.typeof(x).sharding if traced else getattr(x, "sharding", None)
    if not isinstance(sharding, NamedSharding) or sharding.mesh.empty or sharding.mesh.size == 1:
        return None
    if traced and not explicit(sharding):
        return None  # the axes that XLA partitions by itself are not in the type, and inside shard_map x is a shard
    return sharding


def explicit(sharding: NamedSharding) -> bool:
    """Whether every axis of the mesh is part of the types of traced arrays."""
    return all(kind == AxisType.Explicit for kind in sharding.mesh.axis_types)


def reduced(sharding: NamedSharding, rank: int, removed: Shape) -> NamedSharding:
    """The sharding of a statistic: the parameter's less the axes that were reduced."""
    spec = [entry for axis, entry in enumerate(_entries(sharding, rank)) if axis not in removed]
    while spec and spec[-1] is None and not explicit(sharding):
        spec.pop()  # as a compiled step will spell it: another spelling would compile it again
    return NamedSharding(sharding.mesh, PartitionSpec(*spec))


def measure(
    tensors: Sequence[Tensor],
    shardings: Sequence[NamedSharding],
    settings: Settings,
) -> list[Measured]:
    """As ``primitives.measure``, for tensors of which every device holds the shard that its sharding says.

    Raises:
        ValueError: the tensors are on different meshes.
    """
    mesh = shardings[0].mesh
    for sharding in shardings:
        if sharding.mesh != mesh:
            remedy = "Put all parameters on one mesh; replicate those that are not split with PartitionSpec()."
            raise ValueError(message("the mesh of every parameter", str(mesh), sharding.mesh, remedy))
    layouts = [tensor.layout for tensor in tensors]
    specs = [PartitionSpec(*_entries(s, len(t.layout.shape))) for s, t in zip(shardings, tensors, strict=True)]

    decay_factors = [jnp.asarray(tensor.decay_factor) for tensor in tensors] if settings.scale_after_decay else []

    def local(
        shards: list[tuple[Any, Any, Any]], decay_factors: list[Any], ema_weight: jax.Array, rho: jax.Array
    ) -> list[tuple[Any, Any, Any, Any, Any]]:
        steps = []
        for k, (layout, spec, (x, g, slots)) in enumerate(zip(layouts, specs, shards, strict=True)):
            shard = Tensor(layout, x, g, slots)
            if decay_factors:
                shard = shard._replace(decay_factor=decay_factors[k].astype(shard.dtype))
            local_settings = dataclasses.replace(
                settings, ema_weight=ema_weight.astype(shard.dtype), rho=rho.astype(shard.dtype)
            )
            transposed = bool(_split(spec, layout.rows)) and not _split(spec, layout.columns)
            steps.append(arrays.measuring(ops, shard, local_settings, transposed))
        updates = _together(steps, specs, mesh.axis_names)
        return [
            (
                update.slots,
                *_factors(update, layout, x),
                arrays.diagnosed(ops, update, layout) if settings.diagnostics else None,
            )
            for update, layout, (x, _, _) in zip(updates, layouts, shards, strict=True)
        ]

    def statistics(layout: Layout, spec: PartitionSpec) -> dict[str, PartitionSpec]:
        return {name: PartitionSpec(*(spec[axis] for axis in layout.keeps(name))) for name in layout.slots}

    def factors(layout: Layout, spec: PartitionSpec) -> list[PartitionSpec]:
        gone = (layout.columns, layout.rows if layout.factored else layout.whole, layout.whole)
        return [PartitionSpec(*(None if axis in axes else entry for axis, entry in enumerate(spec))) for axes in gone]

    def slices(layout: Layout, spec: PartitionSpec) -> PartitionSpec | None:
        return PartitionSpec(*(spec[axis] for axis in layout.batch), None) if settings.diagnostics else None

    roles = list(zip(layouts, specs, strict=True))
    out = jax.shard_map(
        local,
        mesh=mesh,
        in_specs=([(s, s, statistics(layout, s)) for layout, s in roles], *[PartitionSpec()] * 3),
        out_specs=[(statistics(layout, s), *factors(layout, s), slices(layout, s)) for layout, s in roles],
        check_vma=False,  # sums of different tensors travel in one array, so each seems to vary as all do
    )([(t.x, t.g, t.slots) for t in tensors], decay_factors, settings.ema_weight, settings.rho)
    return [
        Measured(arrays.Update(slots, (first, second), alpha), diagnostics)
        for slots, first, second, alpha, diagnostics in out
    ]


def _together(
    steps: list[arrays.Rounds], specs: list[PartitionSpec], mesh_axes: tuple[Any, ...]
) -> list[arrays.Update]:
    """Runs the steps round by round, and completes what all of them wait for in one all-reduce per set of devices."""
    waiting = [next(step) for step in steps]
    updates: list[arrays.Update] = []
    for _ in range(arrays.ROUNDS):
        packs: dict[tuple[MeshAxes, Any], list[tuple[int, int]]] = {}
        for k, partials in enumerate(waiting):
            for i, partial in enumerate(partials):
                split = _split(specs[k], partial.axes)
                axes = tuple(name for name in mesh_axes if name in split)
                if axes:
                    packs.setdefault((axes, partial.sum.dtype), []).append((k, i))
        totals = [[partial.sum for partial in partials] for partials in waiting]
        for (axes, _dtype), members in packs.items():
            pieces = [totals[k][i] for k, i in members]
            packed = jax.lax.psum(jnp.concatenate([piece.ravel() for piece in pieces]), axes)
            at = 0
            for (k, i), piece in zip(members, pieces, strict=True):
                totals[k][i] = packed[at : at + piece.size].reshape(piece.shape)
                at += piece.size
        waiting = []
        for step, sums in zip(steps, totals, strict=True):
            try:
                waiting.append(step.send(sums))
            except StopIteration as finished:
                updates.append(finished.value)
    return updates


def _factors(update: arrays.Update, layout: Layout, x: Any) -> tuple[Any, Any, Any]:
    """The two factors and the step size, all of x's rank."""
    first, second = update.direction
    slices = [n if axis in layout.batch else 1 for axis, n in enumerate(x.shape)]
    if not layout.factored:
        second = jnp.broadcast_to(second, slices)
    return first, second, jnp.broadcast_to(update.alpha, slices)


def _entries(sharding: NamedSharding, rank: int) -> tuple[Any, ...]:
    entries = tuple(sharding.spec)
    return entries + (None,) * (rank - len(entries))


def _split(spec: PartitionSpec, axes: Shape) -> set[str]:
    """The mesh axes over which any of these axes is split."""
    names: set[str] = set()
    for axis in axes:
        entry = spec[axis]
        names.update((entry,) if isinstance(entry, str) else entry or ())
    return names
