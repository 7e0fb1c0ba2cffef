"""DTensors in plain words: where a shard lies, its work, and statistics that say the same about themselves."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.placement_types import Placement as TorchPlacement
from torch.distributed.tensor.placement_types import _StridedShard

from adafactor.core.errors import message
from adafactor.core.factoring import Layout, Shape
from adafactor.core.placement import MeshPlacement, Split
from adafactor.engine.torch.checks import (
    AFRESH,
    check_complete,
    check_float_momentum,
    check_memory,
    check_param,
    fitted,
)
from adafactor.engine.torch.sharded.held import Held, Sharded, local_of
from adafactor.engine.torch.work import Work, slot_dtype


def placement_of(param: DTensor, layout: Layout) -> MeshPlacement:
    """What this process holds of ``param``.

    Raises:
        RuntimeError: the placements do not say where the shard lies in the parameter.
    """
    placements, mesh = param.placements, param.device_mesh
    splits = []
    for placement in placements:
        if isinstance(placement, _StridedShard):
            splits.append(Split(placement.dim % max(1, param.dim()), int(placement.split_factor)))
        elif isinstance(placement, Shard):
            splits.append(Split(placement.dim % max(1, param.dim())))
        elif isinstance(placement, Replicate):
            splits.append(Split(None))
        else:
            remedy = "Redistribute it to Shard or Replicate before it becomes a parameter."
            raise RuntimeError(message("a parameter's placements", "Shard or Replicate", str(placements), remedy))
    coordinate = mesh.get_coordinate()
    if coordinate is None:
        remedy = "Give the optimizer only parameters whose device mesh holds this rank."
        raise RuntimeError(message("a parameter's device mesh", "a mesh with this rank in it", str(mesh), remedy))
    where = MeshPlacement(layout, tuple(mesh.shape), tuple(coordinate), tuple(splits))
    try:
        expected = where.part.shape
    except ValueError:
        remedy = "Shard by tensor parallelism first and by fully_shard second, on one mesh."
        rule = "splits of one axis whose order is known"
        raise RuntimeError(message("a parameter's placements", rule, str(placements), remedy)) from None
    local = tuple(param.to_local().shape)
    if expected != local and not (0 in expected and 0 in local):
        remedy = "Make it with distribute_tensor, parallelize_module or fully_shard."
        rule = f"cut as torch.chunk cuts it, with a local shape of {expected}"
        raise RuntimeError(message(f"a parameter of placements {placements}", rule, local, remedy))
    return where


def sharded(
    param: DTensor,
    draft: Work,
    state: Mapping[str, Any],
    diagnostics_of: Callable[[Tensor, Layout], Tensor | None],
) -> Sharded:
    """What this process holds of a parameter, with zeros for the state that it has not yet. Nothing is written.

    Args:
        draft: all that is said of the whole parameter.
        state: what the optimizer keeps of it.
        diagnostics_of: gives the tensor for diagnostics of the part.

    Raises:
        RuntimeError: the placements do not fit (`placement_of`), or the state does not.
    """
    placement = placement_of(param, draft.layout)
    here, (part,) = param.to_local(), placement.parts
    check_param(here, draft.name)
    check_float_momentum("a DTensor", draft.settings)
    check_complete(draft.layout, state, draft.name)
    kept = {slot: _fitted(param, placement, draft, slot, state.get(slot)) for slot in draft.slots}
    held = {slot: local_of(value) for slot, value in kept.items()}
    its = {placement.here(slot): value for slot, value in held.items()}
    work = replace(draft, param=here, state=its, layout=part, diagnostics=diagnostics_of(param, part))
    sides = f"rows {draft.layout.rows}, columns {draft.layout.columns}"
    kind = f"{param.dtype}, {', '.join(map(str, param.placements))}"
    told = f"{draft.name} {tuple(draft.layout.shape)} of {kind}, {sides}"
    return Sharded(draft, here, held, kept, [Held(placement, [work], told)], param.device_mesh)


def _fitted(param: DTensor, placement: MeshPlacement, draft: Work, slot: str, value: Any) -> Tensor:
    """A state tensor as the parameter needs it: the one that is there where it fits, else a copy, or zeros."""
    layout, part, device = placement.given, placement.part, param.to_local().device
    what = f"{slot} in the state of {draft.name}"
    dtype = slot_dtype(slot, draft.settings, param.dtype)
    if slot == "step":
        return fitted(local_of(value), slot, param.to_local(), ((), dtype), draft.name)
    axes = layout.keeps(slot)
    shape, local_shape = tuple(layout.shape[axis] for axis in axes), tuple(part.shape[axis] for axis in axes)
    if value is None:
        return statistic(torch.zeros(local_shape, dtype=dtype, device=device), param, shape, axes)
    if not isinstance(value, Tensor) or tuple(value.shape) != shape or value.device.type == "meta":
        remedy = f"{AFRESH}, or construct the optimizer with the factoring that wrote it."
        got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise RuntimeError(message(what, f"of shape {shape} for {tuple(param.shape)}", got, remedy))
    check_memory(what, local_of(value))
    if isinstance(value, DTensor) and value.device_mesh == param.device_mesh:
        here = value.to_local()
        if (
            value.placements == tuple(placements_of(param, axes))
            and tuple(here.shape) == local_shape
            and (here.dtype, here.device) == (dtype, device)
            and here.is_contiguous()
        ):
            return value
    return adopt(value, param, layout, slot, dtype)


def statistic(local: Tensor, param: DTensor, shape: Shape, axes: Sequence[int]) -> DTensor:
    """A statistic of ``param`` as a DTensor, sharded where the parameter is along the axes it keeps.

    Args:
        local: this process's part.
        shape: of the whole statistic.
        axes: the parameter's axes that it keeps, in order.
    """
    stride = tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))
    made: DTensor = DTensor.from_local(
        local, param.device_mesh, placements_of(param, axes), run_check=False, shape=torch.Size(shape), stride=stride
    )
    return made


def placements_of(param: DTensor, axes: Sequence[int]) -> list[TorchPlacement]:
    """Where a statistic that keeps ``axes`` of a parameter lies: sharded where the parameter is."""
    placements: list[TorchPlacement] = []
    for placement in param.placements:
        if not isinstance(placement, Shard | _StridedShard) or placement.dim % max(1, param.dim()) not in axes:
            placements.append(Replicate())
        elif isinstance(placement, _StridedShard):
            placements.append(_StridedShard(axes.index(placement.dim), split_factor=placement.split_factor))
        else:
            placements.append(Shard(axes.index(placement.dim % param.dim())))
    return placements


def adopt(value: Tensor, param: DTensor, layout: Layout, slot: str, dtype: torch.dtype) -> DTensor:
    """A loaded statistic or momentum, whole or sharded in whatever way, as ``param`` needs it. Copies."""
    part, axes = placement_of(param, layout).part, layout.keeps(slot)
    shape = tuple(layout.shape[axis] for axis in axes)
    local = torch.empty(tuple(part.shape[axis] for axis in axes), dtype=dtype, device=param.to_local().device)
    wanted = statistic(local, param, shape, axes)
    if isinstance(value, DTensor):
        if value.placements == wanted.placements and value.device_mesh == wanted.device_mesh:
            local.copy_(value.to_local())
            return wanted
        value = value.full_tensor()
    place = tuple(slice(part.offset[axis], part.offset[axis] + part.shape[axis]) for axis in axes)
    local.copy_(value.reshape(shape)[place])
    return wanted


def gradient(param: DTensor, name: str) -> Tensor | None:
    """The local part of the parameter's gradient.

    Raises:
        RuntimeError: it is not sharded over the parameter's mesh, so its parts have no meaning here.
    """
    grad = param.grad
    if grad is None:
        return None
    if not isinstance(grad, DTensor) or grad.device_mesh != param.device_mesh:
        remedy = "Let autograd make it, or use distribute_tensor with the parameter's mesh."
        got = type(grad).__name__
        raise RuntimeError(message(f"the gradient of {name}", "a DTensor on the parameter's mesh", got, remedy))
    if grad.placements != param.placements:  # tensor parallelism leaves a sum to be done
        grad = grad.redistribute(placements=param.placements)
    local = grad.to_local()
    return local.wait() if isinstance(local, AsyncCollectiveTensor) else local
