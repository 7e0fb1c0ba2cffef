"""Who adds up what with whom. Only here are ranks known."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations
from math import prod

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from adafactor.core.factoring import Shape
from adafactor.engine.torch.sharded.held import Sharded
from adafactor.engine.torch.sharded.rank_check import check
from adafactor.engine.torch.sharded.rounds import First, Member, Second
from adafactor.engine.torch.work import math_dtype


class Reducer:
    """The tensors whose sums one group of processes adds up, in the order of the model on all of them.

    Attributes:
        first, second: the rounds; most need no second.
    """

    def __init__(self, group: dist.ProcessGroup | None, device: torch.device, members: Sequence[Member]) -> None:
        self._group, self._members, self._device = group, members, device
        dtypes = [torch.float32, *(math_dtype(member.sharded.param.dtype) for member in members)]
        like = torch.empty(0, dtype=max(dtypes, key=lambda dtype: dtype.itemsize), device=device)
        both = [member for member in members if member.placement.cut == "both"]
        self.first = First(group, members, like)
        self.second = Second(group, both, like) if both else None

    def agree(self) -> None:
        """Compare with the other processes what is about to be added up.

        Raises:
            RuntimeError: they would add up something else; on every one of them.
        """
        if self._group is not None:
            told = [f"{member.held.told}\t, {member.settings}" for member in self._members]
            check(told, self._group, self._device)


def reducers(params: Sequence[Sharded]) -> list[Reducer]:
    """Who adds up what with whom; all ranks come to the same answer, or to the same error.

    Along every mesh a sum runs over the dimensions that split any of its parameters.
    """
    of_meshes: dict[DeviceMesh, list[Member]] = {}
    of_groups: dict[tuple[int, ...], list[Member]] = {}
    first = 0
    for number, its in enumerate(params):
        for held in its.tensors:
            member = Member(its, number, held, range(first, first + len(held.works)))
            first = member.works.stop
            if its.mesh is None:
                ranks = () if its.group is None else tuple(dist.get_process_group_ranks(its.group))
                of_groups.setdefault(ranks, []).append(member)
            elif its.is_split:
                of_meshes.setdefault(its.mesh, []).append(member)
    made: list[tuple[DeviceMesh, Shape, list[Member]]] = []
    split = {mesh: tuple(sorted({d for m in its for d in m.placement.dims})) for mesh, its in of_meshes.items()}
    # The largest groups first: a sum over part of one's ranks can go into its buffer.
    for mesh, dims in sorted(split.items(), key=lambda item: -prod(item[0].shape[dim] for dim in item[1])):
        ranks = ranks_along(mesh, dims)
        larger = next(((members, copy) for m, d, members in made if (copy := copy_of(ranks, m, d))), None)
        members, copy = larger or ([], (0, 1))
        if larger is None:
            made.append((mesh, dims, members))
        members += [replace(member, adds=member.placement.adds(dims), copy=copy) for member in of_meshes[mesh]]
    return [
        *(Reducer(group_of(mesh, dims), torch.device(mesh.device_type), members) for mesh, dims, members in made),
        *(Reducer(its[0].sharded.group, _device_of(its[0].sharded), its) for its in of_groups.values()),
    ]


def _device_of(its: Sharded) -> torch.device:
    """Where a flat parameter's processes want their tensors, which is not where an offloaded one is."""
    group, device = its.group, its.param.device
    if group is None or device.type in {each.type for each in group._device_types}:
        return device
    return group._device_types[0]


def copy_of(ranks: tuple[int, ...], mesh: DeviceMesh, dims: Shape) -> tuple[int, int] | None:
    """Where the sum over ``ranks`` stands among all like it in the group along ``dims``; ``None`` for nowhere.

    The others may hold copies of the same parameter or, where somebody has split it by hand, other halves of it:
    each sum stays a sum of its own.
    """
    place = mesh.get_coordinate()
    assert place is not None
    for count in range(len(dims), 0, -1):
        for along in combinations(dims, count):
            if ranks_along(mesh, along) == ranks:
                index, number = 0, 1
                for dim in dims:
                    if dim not in along:
                        index, number = index * mesh.shape[dim] + place[dim], number * mesh.shape[dim]
                return index, number
    return None


# With the world that each was made in: after destroy_process_group() they are of no use.
_groups: dict[tuple[int, ...], tuple[object, dist.ProcessGroup]] = {}


def ranks_along(mesh: DeviceMesh, dims: Shape) -> tuple[int, ...]:
    """The ranks along ``dims`` of a mesh through this one."""
    place = mesh.get_coordinate()
    assert place is not None
    here = tuple(slice(None) if dim in dims else place[dim] for dim in range(mesh.ndim))
    return tuple(mesh.mesh[here].flatten().tolist())


def group_of(mesh: DeviceMesh, dims: Shape) -> dist.ProcessGroup:
    """Their group: torch's own where it has one, else made once, by these ranks alone."""
    if len(dims) == 1:
        return mesh.get_group(dims[0])
    ranks = ranks_along(mesh, dims)
    whole = dist.group.WORLD
    if len(ranks) == dist.get_world_size() and whole is not None:
        return whole
    world, group = _groups.get(ranks, (None, None))
    if group is None or world is not whole:
        group = dist.new_group(list(ranks), use_local_synchronization=True)
        assert group is not None
        _groups[ranks] = whole, group
    return group
