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
from adafactor.core.factoring import Layout, Part
from adafactor.core.placement import MeshPlacement, Split, within
from adafactor.engine.torch.checks import (
    AFRESH,
    check_complete,
    check_float_momentum,
    check_memory,
    check_param,
    fitted,
)
from adafactor.engine.torch.sharded.held import Held, Sharded
from adafactor.engine.torch.work import Work, local_of, slot_dtype


def placement_of(param: DTensor, layout: Layout) -> MeshPlacement:
    """What this process holds of ``param``.

    Raises:
        RuntimeError: the placements do not say where the shard lies in the parameter.
    """
    placements, mesh = param.placements, param.device_mesh
    splits = []
    for placement in placements:
        if isinstance(placement, Shard | _StridedShard):
            splits.append(Split(placement.dim % max(1, param.dim()), int(getattr(placement, "split_factor", 1))))
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
    kept = {slot: _fitted(param, placement.part, draft, slot, state.get(slot)) for slot in draft.slots}
    held = {slot: local_of(value) for slot, value in kept.items()}
    its = {placement.here(slot): value for slot, value in held.items()}
    work = replace(draft, param=here, state=its, layout=part, diagnostics=diagnostics_of(param, part))
    sides = f"rows {draft.layout.rows}, columns {draft.layout.columns}"
    kind = f"{param.dtype}, {', '.join(map(str, param.placements))}"
    told = f"{draft.name} {tuple(draft.layout.shape)} of {kind}, {sides}"
    return Sharded(draft, here, held, kept, [Held(placement, [work], told)], param.device_mesh)


def _fitted(param: DTensor, part: Part, draft: Work, slot: str, value: Any) -> Tensor:
    """A state tensor as the parameter needs it: the one that is there where it fits, else a copy, or zeros."""
    layout, dtype = draft.layout, slot_dtype(slot, draft.settings, param.dtype)
    if slot == "step":
        return fitted(local_of(value), slot, param.to_local(), ((), dtype), draft.name)
    if value is None:
        return adopt(None, param, layout, slot, dtype)
    axes, what = layout.keeps(slot), f"{slot} in the state of {draft.name}"
    shape = tuple(layout.shape[axis] for axis in axes)
    if not isinstance(value, Tensor) or tuple(value.shape) != shape or value.device.type == "meta":
        remedy = f"{AFRESH}, or construct the optimizer with the factoring that wrote it."
        got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise RuntimeError(message(what, f"of shape {shape} for {tuple(param.shape)}", got, remedy))
    here = local_of(value)
    check_memory(what, here)
    wanted = tuple(part.shape[axis] for axis in axes), dtype, param.to_local().device
    fits = (tuple(here.shape), here.dtype, here.device) == wanted and here.is_contiguous()
    if fits and isinstance(value, DTensor) and _lies(value, param, axes):
        return value
    return adopt(value, param, layout, slot, dtype)


def adopt(value: Tensor | None, param: DTensor, layout: Layout, slot: str, dtype: torch.dtype) -> DTensor:
    """A statistic or momentum, whole or sharded in whatever way, as ``param`` needs it: a copy, or zeros for ``None``.

    It is a DTensor, sharded where the parameter is along the axes that it keeps.
    """
    part, axes = placement_of(param, layout).part, layout.keeps(slot)
    shape = torch.Size(layout.shape[axis] for axis in axes)
    here = torch.zeros([part.shape[axis] for axis in axes], dtype=dtype, device=param.to_local().device)
    if isinstance(value, DTensor) and _lies(value, param, axes):
        here.copy_(value.to_local())
    elif value is not None:
        whole = value.full_tensor() if isinstance(value, DTensor) else value
        place = within(part.offset, part.shape, ())
        here.copy_(whole.reshape(shape)[tuple(place[axis] for axis in axes)])
    stride = tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))
    lies = placements_of(param, axes)
    made: DTensor = DTensor.from_local(here, param.device_mesh, lies, run_check=False, shape=shape, stride=stride)
    return made


def _lies(value: DTensor, param: DTensor, axes: Sequence[int]) -> bool:
    """Whether a statistic that keeps ``axes`` lies as the parameter does."""
    return value.device_mesh == param.device_mesh and list(value.placements) == placements_of(param, axes)


def placements_of(param: DTensor, axes: Sequence[int]) -> list[TorchPlacement]:
    """Where a statistic that keeps ``axes`` of a parameter lies: sharded where the parameter is."""
    placements: list[TorchPlacement] = []
    for placement in param.placements:
        axis = placement.dim % max(1, param.dim()) if isinstance(placement, Shard | _StridedShard) else None
        if axis not in axes:
            placements.append(Replicate())
        elif isinstance(placement, _StridedShard):
            placements.append(_StridedShard(axes.index(axis), split_factor=placement.split_factor))
        else:
            placements.append(Shard(axes.index(axis)))
    return placements


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
