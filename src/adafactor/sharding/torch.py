"""The exact step of sharded parameters: measure the local shards, add up their sums once, apply.

A process sees its shard of every DTensor parameter as a tensor of its own, with the divisors of the whole
(`factoring.Part`). What its sums lack lies on other processes, and `placement.py` says what that is: mostly
column sums, packed for all parameters into one buffer and one all-reduce. Nothing is written before the last sum.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, MutableMapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from math import prod

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.device_mesh import DeviceMesh

from adafactor.factoring import Layout, Shape
from adafactor.hyperparameters import message
from adafactor.kernels import aten, aten_split
from adafactor.kernels.aten_blocks import kept, total
from adafactor.kernels.native_torch import Prepared, prepare
from adafactor.kernels.work import Settings, Work, math_dtype
from adafactor.sharding.agreement import check
from adafactor.sharding.dtensor import kept_axes, placement_of, statistic
from adafactor.sharding.packing import Channel, Entry, entry
from adafactor.sharding.placement import Placement


@dataclass(slots=True, eq=False)
class Shard:
    """This process's part of one parameter.

    Attributes:
        param: the parameter.
        work: of the local tensors; rows and columns have changed places where ``placement.turned``.
        placement: where the part lies.
        name: what errors and the comparison of ranks call it.
        fused: whether native kernels may step it.
        present: whether there is a gradient here; elsewhere there may be one.
        decay: 1 - beta(t) of this step, and ``found``: its sums.
        state: the optimizer's own, by parameter; ``made``: what it holds of this one after this step.
    """

    param: DTensor
    work: Work
    placement: Placement
    name: str
    fused: bool
    present: bool = True
    decay: Tensor | None = None
    found: aten.Sums | None = None
    state: MutableMapping[Tensor, dict[str, Tensor]] = field(default_factory=dict)
    made: dict[str, Tensor] = field(default_factory=dict)

    @property
    def sums(self) -> aten.Sums:
        assert self.found is not None
        return self.found

    def open(self, grad: DTensor | None, state: MutableMapping[Tensor, dict[str, Tensor]]) -> None:
        """Point ``work`` at the local parts of this step's tensors, made of zeros where there are none yet."""
        w, param = self.work, self.param
        w.param = param.to_local()
        self.state, self.present = state, grad is not None
        old = state.get(param, {})
        if grad is None:  # no memory: one zero that stands for all
            w.grad = torch.zeros((), dtype=w.param.dtype, device=w.param.device).expand(w.param.shape)
        else:
            if grad.placements != param.placements:  # tensor parallelism leaves a sum to be done
                grad = grad.redistribute(placements=param.placements)
            w.grad = grad.to_local()
            if isinstance(w.grad, AsyncCollectiveTensor):
                w.grad = w.grad.wait()
        other = {"row": "column", "column": "row"} if self.placement.turned else {}
        made = {slot: old[slot] if slot in old else self._zeros(slot) for slot in w.slots}
        self.made = made
        w.state = {
            other.get(slot, slot): value.to_local() if isinstance(value, DTensor) else value
            for slot, value in made.items()
        }

    def _zeros(self, slot: str) -> Tensor:
        w, roles, part = self.work, self.placement.roles, self.placement.part
        device = w.param.device
        if slot == "step":
            return torch.zeros((), dtype=torch.int64, device=device)
        dtype = math_dtype(w.param.dtype)
        if slot == "momentum":
            dtype = w.settings.momentum_dtype or dtype
        axes = kept_axes(roles, slot)
        local = torch.zeros([part.shape[axis] for axis in axes], dtype=dtype, device=device)
        return statistic(local, self.param, tuple(roles.shape[axis] for axis in axes), axes)

    def commit(self) -> None:
        """Keep the state that this step has written, and let go of the gradient."""
        self.state[self.param].update(self.made)
        del self.work.grad


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

    def rooms(self, second: bool) -> list[Entry]:
        """The buffer's entries besides the flags, in the order of `values`."""
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


class Sharded:
    """Steps shards, and keeps what does not change from step to step.

    The first step, and the first after a change of groups, compares what the ranks are about to add up: one more
    collective of eight bytes.
    """

    def __init__(self) -> None:
        self._key: tuple[object, ...] = ()
        self._exchanges: list[Exchange] = []
        self._tables: dict[tuple[int, ...], Prepared] = {}

    def step(self, shards: Sequence[Shard], skipped: Callable[[torch.device], Tensor]) -> None:
        """One update of every parameter that has a gradient on any rank."""
        self._plan(shards)
        tables = self._measure(shards)
        absent: set[Shard] = set()
        for exchange in self._exchanges:
            absent |= self._first(exchange)
            self._second(exchange)
        here = [shard for shard in shards if shard not in absent]
        for table in tables:
            table.table.apply(torch.get_num_threads())
            table.finish(skipped(torch.device("cpu")))
        in_tables = {w for table in tables for w in table.work}
        rest = {shard.work: shard for shard in here if shard.work not in in_tables}
        for device, works in by_device(rest):
            for run in aten.runs(works):
                aten.apply(run, [rest[w].sums for w in run.work], skipped(device))
        for shard in shards:
            shard.found = None
            if shard not in absent:
                shard.commit()

    def _plan(self, shards: Sequence[Shard]) -> None:
        scaled = tuple(shard.work.settings.hyperparameters.scale_parameter for shard in shards)
        key = (tuple(map(id, shards)), scaled)
        if key != self._key:
            self._exchanges = exchanges(shards)
            self._key = key

    def _measure(self, shards: Sequence[Shard]) -> list[Prepared]:
        """Everything that can be known without the other processes."""
        fast = [shard for shard in shards if shard.fused and native_can(shard)]
        tables = []
        if fast:
            prepared = self._prepared([shard.work for shard in fast])
            if prepared.work:
                prepared.begin([w.grad for w in prepared.work], np.zeros(len(prepared.work), np.bool_))
                prepared.table.measure(torch.get_num_threads())
                tables.append(prepared)
                found = dict(zip(prepared.work, table_sums(prepared), strict=True))
                for shard in fast:
                    shard.found = found.get(shard.work)
        by_work = {shard.work: shard for shard in shards if shard.found is None}
        for run in (run for _, works in by_device(by_work) for run in aten.runs(works)):
            for w, decay in zip(run.work, run.decay, strict=True):
                shard = by_work[w]
                shard.decay = decay
                both = shard.placement.mode == "both"
                shard.found = aten_split.first(w) if both else aten.measure(w, decay)
                if shard.placement.mode == "stack" and w.layout.factored:
                    shard.found.sum_u2 = aten_split.squares_of_stack(w, shard.found, decay)
        return tables

    def _prepared(self, work: list[Work]) -> Prepared:
        key = tuple(map(id, work))
        prepared = self._tables.get(key)
        if prepared is None or prepared.stale():
            self._tables.clear()
            prepared = self._tables[key] = prepare(work)
            prepared.table.allocate_sums()
        return prepared

    def _first(self, exchange: Exchange) -> set[Shard]:
        """The round that makes S, W and Q complete; returns the parameters without a gradient anywhere."""
        shards = [member.shard for member in exchange.members]
        values: list[Tensor] = []
        checks = []
        for shard in shards:
            found = shard.sums
            checks.append(found.W.sum() if found.S is None else found.W.sum() + found.S.sum())
            values += [value for value, _ in parts_of(shard)]
        device, dtype = exchange.channel.device, exchange.channel.dtype
        broken = ~torch.stack([value.to(device, dtype) for value in checks]).isfinite()
        present = torch.tensor([shard.present for shard in shards], device=device)
        flags = torch.cat([broken.to(dtype), present.to(dtype)])
        rooms = [Entry(tuple(flags.shape), None, True), *exchange.rooms(second=False)]
        summed = exchange.channel.add(rooms, [flags, *values])
        taken = iter(zip(rooms[1:], summed[1:], strict=True))
        bad = summed[0][: len(shards)] > 0
        for shard, spoilt in zip(shards, bad, strict=True):
            for value, slot in parts_of(shard):
                room, canvas = next(taken)
                complete = room.here(canvas).to(value.device, value.dtype)
                if slot == "sum_u2" and shard.work.layout.factored:
                    shard.sums.sum_u2 = complete
                else:
                    value.copy_(complete)
            if shard.work.settings.skip_nonfinite:
                spoil(shard.sums, spoilt)
        if all(shard.present for shard in shards):
            return set()
        count = summed[0][len(shards) :].tolist()  # the only question to the device, where a gradient is missing
        return {shard for shard, present_on in zip(shards, count, strict=True) if not present_on}

    def _second(self, exchange: Exchange) -> None:
        """The round that makes Σu² complete where neither rows nor columns were; nothing where there is no such."""
        split = [member.shard for member in exchange.members if member.shard.placement.mode == "both"]
        if not split:
            return
        values: list[Tensor] = []
        for shard in split:
            assert shard.decay is not None
            values += aten_split.second(shard.work, shard.sums, shard.decay)
        rooms = exchange.rooms(second=True)
        summed = iter(zip(rooms, exchange.channel.add(rooms, values), strict=True))
        for shard in split:
            layout, found = shard.work.layout, shard.sums
            (room, weighted), (_, columns) = next(summed), next(summed)
            means = columns / layout.m
            per_slice = total(room.copy(means * weighted), layout.whole)
            device, dtype = shard.work.param.device, found.W.dtype
            found.mu = room.here(means).to(device, dtype)
            place = [slice(None) if axis in layout.whole else part for axis, part in enumerate(room_of(room, layout))]
            mine = per_slice[tuple(place)].to(device, dtype)
            found.sum_u2 = mine + found.W.sum() * 0  # a spoilt W spoils it


def by_device(works: Iterable[Work]) -> list[tuple[torch.device, list[Work]]]:
    """Works by where they are; a process may have left some parameters on the host."""
    found: dict[torch.device, list[Work]] = {}
    for w in works:
        found.setdefault(w.param.device, []).append(w)
    return list(found.items())


def room_of(room: Entry, layout: Layout) -> tuple[slice, ...]:
    """Where this process's part lies, axis by axis of the parameter."""
    return room.place[1:] if room.place is not None else (slice(None),) * len(layout.shape)


def parts_of(shard: Shard) -> list[tuple[Tensor, str]]:
    """What a shard adds to the first round, and gets back complete; `Exchange.rooms` has the same order."""
    found, place = shard.sums, shard.placement
    if place.mode == "alone":
        return []
    parts: list[tuple[Tensor | None, str]] = []
    if shard.work.settings.hyperparameters.scale_parameter:
        parts.append((found.Q, "Q"))
    if place.mode == "stack":
        parts.append((found.sum_u2 if shard.work.layout.factored else found.W, "sum_u2"))
    elif place.mode == "rows":
        parts += [(found.S, "S"), (found.W, "W")]
    else:
        layout = shard.work.layout
        sides = ((layout.rows, found.S, "S"), (layout.columns, found.rows, "rows"))
        parts += [(value, slot) for axes, value, slot in sides if place.split & set(axes)]
    return [(value, slot) for value, slot in parts if value is not None]


def spoil(found: aten.Sums, spoilt: Tensor) -> None:
    """Make a tensor's sums NaN where another rank's gradient was not finite, so that all ranks leave it alone."""
    nan = torch.where(spoilt, torch.nan, 0.0).to(found.W.device, found.W.dtype)
    found.W += nan
    if found.sum_u2 is not None:
        found.sum_u2 = found.sum_u2 + nan


def native_can(shard: Shard) -> bool:
    """Whether the native kernels can measure this shard; the rest goes to torch operations."""
    w, mode = shard.work, shard.placement.mode
    one_round = mode in ("alone", "rows") or not w.layout.factored
    return one_round and shard.present and bool(w.layout.size) and w.grad.is_contiguous()


def table_sums(prepared: Prepared) -> list[aten.Sums]:
    """The table's own sums as tensors: what is written there is what apply reads."""
    table, found = prepared.table, []
    flat = {name: torch.from_numpy(sums) for name, sums in table.sums.items()}
    for k, w in enumerate(prepared.work):
        layout = w.layout
        dtype = "float64" if w.param.dtype == torch.float64 else "float32"
        size, base = table.forms[k].sums_size, table.sums[dtype].ctypes.data
        shape = kept(layout, layout.rows if layout.factored else layout.whole)
        width = table.sums[dtype].itemsize

        def view(
            name: str, k: int = k, base: int = base, width: int = width, size: int = size, dtype: str = dtype,
            shape: Shape = shape,
        ) -> Tensor:  # fmt: skip
            first = (int(table.records[name][k]) - base) // width
            return flat[dtype][first : first + size].view(shape)

        Q = torch.from_numpy(table.Q[k]).view(kept(layout, layout.whole))
        found.append(aten.Sums(None, view("S"), view("W"), Q))
    return found


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


def shard_of(param: DTensor, roles: Layout, settings: Settings, lr: float | Tensor, tensor: int, name: str) -> Shard:
    """This process's part of a parameter. Nothing of it is read yet.

    Raises:
        RuntimeError: the placements do not fit; see `dtensor.placement_of`.
    """
    place = placement_of(param, roles)
    part = place.part.turned if place.turned else place.part
    local = param.to_local()
    return Shard(param, Work(local, local, {}, part, settings, lr, tensor, aten.step), place, name, fused=True)


def gradient(param: DTensor) -> DTensor | None:
    """The parameter's gradient.

    Raises:
        RuntimeError: it is not sharded over the parameter's mesh, so its parts have no meaning here.
    """
    grad = param.grad
    if grad is not None and (not isinstance(grad, DTensor) or grad.device_mesh != param.device_mesh):
        remedy = "Let autograd make it, or use distribute_tensor with the parameter's mesh."
        got = type(grad).__name__
        raise RuntimeError(message("a sharded parameter's gradient", "a DTensor on the parameter's mesh", got, remedy))
    return grad
