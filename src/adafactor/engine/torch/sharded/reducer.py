"""Who adds up what with whom, and the one all-reduce that does it.

What a part's sums lack follows from how it is cut (`placement.py`):

    rows     S, W and Q                                       first round
    stack    the sum of u² of a slice, and Q                  first round
    both     row sums, S and Q; then what eq. 7 adds up       first and second round

Only here are ranks known. What is completed, is completed in the `Sums` that finish reads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from math import prod

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor.device_mesh import DeviceMesh

from adafactor.core.factoring import Layout, Shape
from adafactor.engine.torch.blocks import total
from adafactor.engine.torch.sharded.packing import AllReduce, Slot, slot_of
from adafactor.engine.torch.sharded.placement import Placement
from adafactor.engine.torch.sharded.rank_check import check
from adafactor.engine.torch.sharded.shard import Shard
from adafactor.engine.torch.work import Sums, Work, math_dtype


@dataclass(frozen=True, slots=True, eq=False)
class Member:
    """A shard in a sum.

    Attributes:
        at: the shard's place in the list.
        layout, placement: of its local part.
        scaled: whether its parameter scale is asked for, and so Q.
        dims: the dimensions of its mesh that the sum runs along.
        copy: which of how many sums of this parameter in one buffer is meant, where the buffer's group is larger.
    """

    at: int
    layout: Layout
    placement: Placement
    scaled: bool
    dims: Shape
    copy: tuple[int, int] = (0, 1)

    def slot(self, reduced: Shape, summed: Shape = ()) -> Slot:
        return slot_of(self.placement, reduced, self.dims, summed, self.copy)

    def first(self, sums: Sums) -> list[tuple[Shape, Tensor | None]]:
        """What it adds to the first round and gets back complete, each with the axes it was summed over."""
        layout, cut = self.layout, self.layout.cut
        if cut == "nothing":
            return []
        values: list[tuple[Shape, Tensor | None]] = [(layout.whole, sums.Q)] if self.scaled else []
        if cut == "stack":
            values.append((layout.whole, sums.u2 if layout.factored else sums.W))
        elif cut == "rows":
            values += [(layout.rows, sums.S), (layout.rows, sums.W)]
        else:
            sides = ((layout.rows, sums.S), (layout.columns, sums.rows))
            values += [(axes, value) for axes, value in sides if self.placement.split & set(axes)]
        return values


@dataclass(slots=True, eq=False)
class Reducer:
    """The shards whose sums one group of processes adds up, in the order of the model on all of them."""

    all_reduce: AllReduce
    members: list[Member]
    mesh: DeviceMesh
    dims: Shape
    _slots: dict[bool, list[Slot]] = field(default_factory=dict)
    _nonfinite: dict[int, Tensor] = field(default_factory=dict)

    def first(self, work: Sequence[Work], sums: Sequence[Sums], present: Sequence[bool]) -> set[int]:
        """Complete S, W and Q, row sums or Σu²; returns the places of shards without a gradient anywhere."""
        members = self.members
        ours = [sums[member.at] for member in members]
        checks = [s.W.sum() if s.S is None else s.W.sum() + s.S.sum() for s in ours]
        device, dtype = self.all_reduce.device, self.all_reduce.dtype
        broken = ~torch.stack([value.to(device, dtype) for value in checks]).isfinite()
        here = torch.tensor([present[member.at] for member in members], device=device)
        flags = torch.cat([broken.to(dtype), here.to(dtype)])
        values = [value for member, its in zip(members, ours, strict=True) for _, value in member.first(its)]
        if False not in self._slots:
            reduced = [
                (member, axes) for member, its in zip(members, ours, strict=True) for axes, _ in member.first(its)
            ]
            self._slots[False] = [member.slot(axes) for member, axes in reduced]
        slots = [Slot(tuple(flags.shape), None, True), *self._slots[False]]
        totals = self.all_reduce.add(slots, [flags, *[value for value in values if value is not None]])
        rest = iter(zip(slots[1:], totals[1:], strict=True))
        self._nonfinite = {}
        for member, its, nonfinite in zip(members, ours, totals[0][: len(members)] > 0, strict=True):
            for _, value in member.first(its):
                assert value is not None
                slot, buffer = next(rest)
                value.copy_(slot.here(buffer))
            if work[member.at].settings.skip_nonfinite:  # all ranks must leave alone what one of them does
                nan = torch.where(nonfinite, torch.nan, 0.0).to(its.W.device, its.W.dtype)
                its.W += nan
                its.nonfinite = nan
                if its.u2 is not None:
                    its.u2 += nan
                self._nonfinite[member.at] = nan
        if all(present[member.at] for member in members):
            return set()
        count = totals[0][len(members) :].tolist()  # the only question to the device, where a gradient is missing
        return {member.at for member, on in zip(members, count, strict=True) if not on}

    def second(self, sums: Sequence[Sums]) -> None:
        """Complete Σu² of parts that are cut along both sides; nothing where there is none."""
        members = [member for member in self.members if member.layout.cut == "both"]
        if not members:
            return
        if True not in self._slots:
            sides = [(member, (*member.layout.rows, *member.layout.columns)) for member in members]
            self._slots[True] = [
                slot for m, axes in sides for slot in (m.slot(axes), m.slot(axes, summed=m.layout.rows))
            ]
        values = [value for m in members for value in (sums[m.at].weighted, sums[m.at].columns)]
        totals = iter(self.all_reduce.add(self._slots[True], [value for value in values if value is not None]))
        for member, slot in zip(members, self._slots[True][::2], strict=True):
            layout, its = member.layout, sums[member.at]
            weighted, columns = next(totals), next(totals)
            means = columns / layout.m
            per_slice = total(slot.copy(means * weighted), layout.whole)
            device, dtype = its.W.device, its.W.dtype
            its.mu = slot.here(means).to(device, dtype)
            place = (slice(None),) * len(layout.shape) if slot.place is None else slot.place[1:]
            mine = [slice(None) if axis in layout.whole else part for axis, part in enumerate(place)]
            its.u2 = per_slice[tuple(mine)].to(device, dtype) + self._nonfinite.get(member.at, 0)


def reducers(shards: Sequence[Shard]) -> list[Reducer]:
    """Who adds up what with whom; all ranks come to the same answer, or to the same error.

    Along every mesh a sum runs over the dimensions that split any of its parameters.
    """
    dims: dict[DeviceMesh, set[int]] = {}
    for shard in shards:
        if shard.placement.dims:
            dims.setdefault(shard.param.device_mesh, set()).update(shard.placement.dims)
    made: dict[tuple[int, ...], Reducer] = {}
    # The largest groups first: a sum over part of one's ranks can go into its buffer.
    for mesh, along in sorted(dims.items(), key=lambda item: -prod(item[0].shape[dim] for dim in item[1])):
        here = tuple(sorted(along))
        split = [k for k, s in enumerate(shards) if s.placement.dims and s.param.device_mesh == mesh]
        ranks = ranks_along(mesh, here)
        dtypes = [torch.float32, *(math_dtype(shards[k].param.dtype) for k in split)]
        inside = next((e for e in made.values() if copy_of(ranks, e.mesh, e.dims)), None)
        if inside is None:
            all_reduce = AllReduce(group_of(mesh, here, ranks), torch.device(mesh.device_type), torch.float32)
            inside = made[ranks] = Reducer(all_reduce, [], mesh, here)
        copy = copy_of(ranks, inside.mesh, inside.dims)
        assert copy is not None
        widest = max([inside.all_reduce.dtype, *dtypes], key=lambda dtype: dtype.itemsize)
        inside.all_reduce = replace(inside.all_reduce, dtype=widest)
        inside.members += [_member(k, shards[k], here, copy) for k in split]
    for reducer in made.values():
        described = [description(shards[member.at]) for member in reducer.members]
        check(described, reducer.all_reduce.group, reducer.all_reduce.device)
    return list(made.values())


def _member(at: int, shard: Shard, dims: Shape, copy: tuple[int, int]) -> Member:
    scaled = shard.work.settings.hyperparameters.scale_parameter
    return Member(at, shard.work.layout, shard.placement, scaled, dims, copy)


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
    w, layout = shard.work, shard.placement.layout
    kind = f"{w.param.dtype}, {', '.join(map(str, shard.param.placements))}"
    sides = f"rows {layout.rows}, columns {layout.columns}"
    return f"{w.name} {tuple(layout.shape)} of {kind}, {sides}\t, {w.settings}"


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
