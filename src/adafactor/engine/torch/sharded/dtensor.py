"""DTensors in plain words: where a shard lies, and statistics that say the same about themselves."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.placement_types import Placement as TorchPlacement
from torch.distributed.tensor.placement_types import _StridedShard

from adafactor.core.errors import message
from adafactor.core.factoring import Layout, Shape
from adafactor.engine.torch.sharded.placement import Placement, Split


def placement_of(param: DTensor, layout: Layout) -> Placement:
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
    where = Placement(layout, tuple(mesh.shape), tuple(coordinate), tuple(splits))
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
