"""The exact step of sharded parameters: measure the local shards, add up their sums once, apply.

A process sees its shard of every DTensor parameter as a tensor of its own, with the divisors of the whole
(`factoring.Part`). What its sums lack lies on other processes, and `placement.py` says what that is: mostly
column sums, packed for all parameters into one buffer and one all-reduce. Nothing is written before the last sum.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from adafactor.core.factoring import Layout, Shape
from adafactor.engine.torch import eager, eager_split
from adafactor.engine.torch.blocks import kept, total
from adafactor.engine.torch.cpu import Prepared, prepare
from adafactor.engine.torch.sharded.packing import Entry
from adafactor.engine.torch.sharded.reducer import Exchange, exchanges
from adafactor.engine.torch.sharded.shard import Shard
from adafactor.engine.torch.work import Work


class Sharded:
    """Steps shards, and keeps what does not change from step to step.

    The first step, and the first after a change of groups, compares what the ranks are about to add up: one more
    collective of eight bytes.

    Args:
        lists: of how many lists of shards that is kept; the same on all ranks.
    """

    def __init__(self, lists: int) -> None:
        self._lists = lists
        self._plans: dict[tuple[object, ...], tuple[Sequence[Shard], list[Exchange]]] = {}
        self._tables: dict[tuple[int, ...], Prepared] = {}

    def step(self, shards: Sequence[Shard], skipped: Callable[[torch.device], Tensor]) -> None:
        """One update of every parameter that has a gradient on any rank."""
        plan = self._plan(shards)
        tables = self._measure(shards)
        absent: set[Shard] = set()
        for exchange in plan:
            absent |= self._first(exchange)
            self._second(exchange)
        here = [shard for shard in shards if shard not in absent]
        for table in tables:
            table.table.apply(torch.get_num_threads())
            table.finish(skipped(torch.device("cpu")))
        in_tables = {w for table in tables for w in table.work}
        rest = {shard.work: shard for shard in here if shard.work not in in_tables}
        for device, works in by_device(rest):
            for run in eager.runs(works):
                eager.apply(run, [rest[w].sums for w in run.work], skipped(device))
        for shard in shards:
            shard.found = None
            if shard not in absent:
                shard.commit()

    def _plan(self, shards: Sequence[Shard]) -> list[Exchange]:
        scaled = tuple(shard.work.settings.hyperparameters.scale_parameter for shard in shards)
        key = (tuple(map(id, shards)), scaled)
        if key not in self._plans:
            if len(self._plans) >= self._lists:
                self._plans.clear()
            self._plans[key] = shards, exchanges(shards)
        return self._plans[key][1]

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
                    if shard.found is not None and shard.placement.mode == "stack" and shard.work.layout.factored:
                        its_decay = shard.work.settings.hyperparameters.decay(int(shard.work.state["step"]) + 1)
                        shard.found.sum_u2 = eager_split.squares_of_stack(shard.work, shard.found, its_decay)
        by_work = {shard.work: shard for shard in shards if shard.found is None}
        for run in (run for _, works in by_device(by_work) for run in eager.runs(works)):
            for w, decay in zip(run.work, run.decay, strict=True):
                shard = by_work[w]
                shard.decay = decay
                both = shard.placement.mode == "both"
                shard.found = eager_split.first(w) if both else eager.measure(w, decay)
                if shard.placement.mode == "stack" and w.layout.factored:
                    shard.found.sum_u2 = eager_split.squares_of_stack(w, shard.found, decay)
        return tables

    def _prepared(self, work: list[Work]) -> Prepared:
        key = tuple(map(id, work))
        prepared = self._tables.get(key)
        if prepared is None or prepared.stale():
            if len(self._tables) >= self._lists:
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
                    if shard.sums.rows is None:
                        share_of_stack(shard.sums, complete)
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
            values += eager_split.second(shard.work, shard.sums, shard.decay)
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


def spoil(found: eager.Sums, spoilt: Tensor) -> None:
    """Make a tensor's sums NaN where another rank's gradient was not finite, so that all ranks leave it alone."""
    nan = torch.where(spoilt, torch.nan, 0.0).to(found.W.device, found.W.dtype)
    found.W += nan
    found.spoilt = nan
    if found.sum_u2 is not None:
        found.sum_u2 = found.sum_u2 + nan


def share_of_stack(found: eager.Sums, complete: Tensor) -> None:
    """Have the native kernels find the Σu² of all parts of a stack in the W of this one.

    From here on W serves that sum alone, and the sum is linear in W. Where this part's is 0, so is its gradient, and
    the clip factor multiplies nothing.
    """
    assert found.sum_u2 is not None
    mine = found.sum_u2.double()
    found.W.copy_(found.W.double() * torch.where((mine == 0) & complete.isfinite(), 1.0, complete.double() / mine))


def native_can(shard: Shard) -> bool:
    """Whether the native kernels can measure this shard; the rest goes to torch operations."""
    w = shard.work
    one_round = shard.placement.mode != "both" or not w.layout.factored
    return one_round and shard.present and bool(w.layout.size) and w.grad.is_contiguous()


def table_sums(prepared: Prepared) -> list[eager.Sums]:
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
        found.append(eager.Sums(None, view("S"), view("W"), Q))
    return found
