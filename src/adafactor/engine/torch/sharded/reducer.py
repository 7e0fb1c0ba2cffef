"""Who adds up what with whom."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from math import prod

import torch
import torch.distributed as dist
from torch.distributed.tensor.device_mesh import DeviceMesh

from adafactor.core.factoring import Shape
from adafactor.engine.torch.sharded.packing import Channel, Entry, entry
from adafactor.engine.torch.sharded.rank_check import check
from adafactor.engine.torch.sharded.shard import Shard
from adafactor.engine.torch.work import math_dtype


@dataclass(frozen=True, slots=True, eq=False)
class Member:
    """A shard in a sum.

    Attributes:
        dims: the dimensions of its mesh that the sum runs along.
        copy: which of how many sums of this parameter in one buffer is meant, where the buffer's group is larger.
    """

    shard: Shard
    dims: Shape
    copy: tuple[int, int] = (0, 1)


@dataclass(slots=True, eq=False)
class Exchange:
    """The shards whose sums one group of processes adds up, in the order of the model on all of them."""

    channel: Channel
    members: list[Member]
    mesh: DeviceMesh
    dims: Shape
    _rooms: dict[bool, list[Entry]] = field(default_factory=dict)

    def rooms(self, second: bool) -> list[Entry]:
        """The buffer's entries besides the flags, member by member. They are the same in every step."""
        if second not in self._rooms:
            self._rooms[second] = self._made(second)
        return self._rooms[second]

    def _made(self, second: bool) -> list[Entry]:
        rooms = []
        for member in self.members:
            layout, place = member.shard.work.layout, member.shard.placement

            def room(reduced: Shape, summed: Shape = (), member: Member = member) -> Entry:
                return entry(member.shard.placement, reduced, member.dims, summed, member.copy)

            if second:
                if place.mode == "both":
                    matrix = (*layout.rows, *layout.columns)
                    rooms += [room(matrix), room(matrix, layout.rows)]
                continue
            if place.mode == "alone":
                continue
            if member.shard.work.settings.hyperparameters.scale_parameter:
                rooms.append(room(layout.whole))
            if place.mode == "stack":
                rooms.append(room(layout.whole))
            elif place.mode == "rows":
                rooms += [room(layout.rows)] * 2
            else:
                rooms += [room(axes) for axes in (layout.rows, layout.columns) if place.split & set(axes)]
        return rooms


def exchanges(shards: Sequence[Shard]) -> list[Exchange]:
    """Who adds up what with whom; all ranks come to the same answer, or to the same error.

    Along every mesh a sum runs over the dimensions that split any of its parameters.
    """
    dims: dict[DeviceMesh, set[int]] = {}
    for shard in shards:
        if shard.placement.dims:
            dims.setdefault(shard.param.device_mesh, set()).update(shard.placement.dims)
    found: dict[tuple[int, ...], Exchange] = {}
    # The largest groups first: a sum over part of one's ranks can go into its buffer.
    for mesh, along in sorted(dims.items(), key=lambda item: -prod(item[0].shape[dim] for dim in item[1])):
        here, split = tuple(sorted(along)), [s for s in shards if s.placement.dims and s.param.device_mesh == mesh]
        ranks = ranks_along(mesh, here)
        widest = max([torch.float32, *(math_dtype(shard.param.dtype) for shard in split)], key=lambda d: d.itemsize)
        inside = next((e for e in found.values() if copy_of(ranks, e.mesh, e.dims)), None)
        if inside is None:
            channel = Channel(group_of(mesh, here, ranks), torch.device(mesh.device_type), widest)
            inside = found[ranks] = Exchange(channel, [], mesh, here)
        copy = copy_of(ranks, inside.mesh, inside.dims)
        assert copy is not None
        inside.channel = replace(inside.channel, dtype=max(inside.channel.dtype, widest, key=lambda d: d.itemsize))
        inside.members += [Member(shard, here, copy) for shard in split]
    for exchange in found.values():
        described = [description(member.shard) for member in exchange.members]
        check(described, exchange.channel.group, exchange.channel.device)
    return list(found.values())


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


def description(shard: Shard) -> str:
    """What ranks must agree on."""
    w = shard.work
    roles = shard.placement.roles
    kind = f"{w.param.dtype}, {', '.join(map(str, shard.param.placements))}"
    return f"{shard.name} {tuple(roles.shape)} of {kind}, rows {roles.rows}, columns {roles.columns}\t, {w.settings}"


_groups: dict[tuple[int, ...], dist.ProcessGroup] = {}


def ranks_along(mesh: DeviceMesh, dims: Shape) -> tuple[int, ...]:
    """The ranks along ``dims`` of a mesh through this one."""
    place = mesh.get_coordinate()
    assert place is not None
    here = tuple(slice(None) if dim in dims else place[dim] for dim in range(mesh.ndim))
    return tuple(mesh.mesh[here].flatten().tolist())


def group_of(mesh: DeviceMesh, dims: Shape, ranks: tuple[int, ...]) -> dist.ProcessGroup:
    """Their group: torch's own where it has one, else made once, by these ranks alone."""
    if len(dims) == 1:
        return mesh.get_group(dims[0])
    if len(ranks) == dist.get_world_size() and dist.group.WORLD is not None:
        return dist.group.WORLD
    if ranks not in _groups:
        made = dist.new_group(list(ranks), use_local_synchronization=True)
        assert made is not None
        _groups[ranks] = made
    return _groups[ranks]
