"""The exact step of flat parameters: measure, reduce, finish, apply.

Two all-reduces: row sums of cut rows, S and Q, and of unfactored tensors Σu²; then what eq. 7 adds up, of every cut
matrix the mean of its rows, which is that of its columns, and Σ W / column. W itself is not sent: with S everybody has
the finished columns of its matrices, and Σ W / column adds up as W does. Nothing is written before the last sum.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from math import prod
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from adafactor.core.factoring import Layout, Shape
from adafactor.core.intervals import Flat, Index, Shared
from adafactor.engine.torch.blocks import total
from adafactor.engine.torch.checks import Witness
from adafactor.engine.torch.choose import Plan
from adafactor.engine.torch.sharded.flat import FlatParam
from adafactor.engine.torch.sharded.rank_check import check, summed
from adafactor.engine.torch.sharded.shard import absent
from adafactor.engine.torch.work import Sums, Work, math_dtype

Values = Sequence[Tensor | None]  # of every box in the plan


@dataclass(frozen=True, slots=True)
class Room:
    """Some numbers of a buffer, and what boxes add to them: the number of the box, which of its numbers, and where."""

    where: slice
    spots: list[tuple[int, slice | Tensor, slice | Tensor]]

    @classmethod
    def of(cls, shared: Shared, first: int, box: int) -> Room:
        """Of a tensor whose first box has number ``box``."""
        spots = [(box + spot.box, _index(spot.mine), _index(spot.there)) for spot in shared.spots]
        return cls(slice(first, first + shared.size), spots)

    def add(self, buffer: Tensor, values: Values) -> None:
        room = buffer[self.where]
        for box, mine, there in self.spots:
            if (value := values[box]) is not None:
                room[there] += value.view(-1)[mine].to(room.device, room.dtype)

    def take(self, buffer: Tensor, values: Values) -> None:
        room = buffer[self.where]
        for box, mine, there in self.spots:
            if (value := values[box]) is not None:
                value.view(-1)[mine] = room[there].to(value.device, value.dtype)


def _index(index: Index) -> slice | Tensor:
    return index if isinstance(index, slice) else torch.from_numpy(index)


@dataclass(frozen=True, slots=True)
class Member:
    """One tensor: where it lies, the number of its flat parameter, and the numbers of its boxes in the plan."""

    flat: Flat
    param: int
    boxes: range


class Reducer:
    """The tensors whose sums one group of processes adds up, in the order of the model on all of them."""

    def __init__(self, group: dist.ProcessGroup | None, members: list[Member], params: Sequence[FlatParam]) -> None:
        self.group, self.members = group, members
        its = [params[member.param] for member in members]
        self.device = its[0].param.device
        if group is not None and self.device.type not in {device.type for device in group._device_types}:  # offloaded
            self.device = group._device_types[0]
        self.dtype = max((math_dtype(param.param.dtype) for param in its), key=lambda dtype: dtype.itemsize)
        self.stops = torch.tensor([param.draft.settings.skip_nonfinite for param in its], device=self.device)
        self.first_rooms: list[tuple[str, Room]] = []
        lengths: list[int] = []
        ends = [2 * len(members)]
        for member, param in zip(members, its, strict=True):
            layout = member.flat.layout
            for kind, reduced in _kinds(layout, param.draft.settings.hyperparameters.scale_parameter):
                shared = member.flat.shared(reduced)
                self.first_rooms.append((kind, Room.of(shared, ends[-1], member.boxes.start)))
                ends.append(ends[-1] + shared.size)
            lengths.append(ends[-1] - 2 * len(members) - sum(lengths))
        self.size = ends[-1]
        self.lengths = torch.tensor(lengths, device=self.device)
        self.owner = torch.tensor([k for k, member in enumerate(members) for _ in member.boxes], dtype=torch.int64)
        factored = [member for member in members if member.flat.layout.factored]
        slices = [member.flat.shared(member.flat.layout.whole) for member in factored]
        at_matrix = list(accumulate((member.flat.matrices.size for member in factored), initial=0))
        at_slice = list(accumulate((shared.size for shared in slices), initial=0))
        self.matrices = [
            Room.of(m.flat.matrices, at, m.boxes.start) for m, at in zip(factored, at_matrix, strict=False)
        ]
        self.slices = [
            Room.of(shared, at, m.boxes.start) for m, shared, at in zip(factored, slices, at_slice, strict=False)
        ]
        self.matrix_count, self.slice_count = at_matrix[-1], at_slice[-1]

        def each(values: list[Tensor]) -> Tensor:
            return torch.cat([torch.zeros(0, dtype=torch.int64), *values]).to(self.device)

        self.rows = each([torch.full((m.flat.matrices.size,), m.flat.layout.n) for m in factored])
        self.slice_of = each(
            [at + torch.from_numpy(m.flat.slice_of) for m, at in zip(factored, at_slice, strict=False)]
        )
        self.stacked = each(
            [torch.arange(*ends) for m, ends in zip(factored, pairwise(at_slice), strict=True) if m.flat.stacked]
        )

        for member in members:
            member.flat.forget()

    def _add_up(self, buffer: Tensor) -> None:
        if self.group is not None and self.group.size() > 1 and len(buffer):
            dist.all_reduce(buffer, group=self.group)

    def first(self, sums: Sequence[Sums], work: Sequence[Work], present: Sequence[bool]) -> list[Member]:
        """Complete row sums, S, Q and the Σu² of unfactored tensors; returns those without a gradient anywhere."""
        count = len(self.members)
        buffer = torch.zeros(self.size, dtype=self.dtype, device=self.device)
        if len(self.owner):
            ours = [sums[k] for member in self.members for k in member.boxes]
            checks = [its.W.sum() if its.S is None else its.S.sum() for its in ours]
            bad = ~torch.stack(checks).isfinite()
            buffer[:count].index_add_(0, self.owner.to(self.device), bad.to(self.device, self.dtype))
        buffer[count : 2 * count] = torch.tensor([float(present[m.param]) for m in self.members])
        values: dict[str, list[Tensor | None]] = {
            "rows": [s.rows if w.layout.cut == "both" else None for s, w in zip(sums, work, strict=True)],
            "S": [s.S for s in sums],
            "Q": [s.Q for s in sums],
            "u2": [s.W for s in sums],
        }
        for kind, room in self.first_rooms:
            room.add(buffer, values[kind])
        self._add_up(buffer)
        for kind, room in self.first_rooms:
            room.take(buffer, values[kind])
        # What is finite everywhere may add up to what is not.
        ends = torch.segment_reduce(buffer[2 * count :], "sum", lengths=self.lengths, unsafe=True)
        bad = ((buffer[:count] > 0) | ~ends.isfinite()) & self.stops
        # All processes must leave alone what one of them does. On a device it is not asked, because that would wait.
        self.nan = None if self.device.type == "cpu" and not bool(bad.any()) else torch.where(bad, torch.nan, 0.0)
        if self.nan is not None:
            for member, nan in zip(self.members, self.nan.unbind(), strict=True):
                for k in member.boxes:
                    if sums[k].S is None:
                        sums[k].W += nan.to(sums[k].W.device)
        if all(present[member.param] for member in self.members):
            return []
        there = buffer[count : 2 * count].tolist()
        return [member for member, on in zip(self.members, there, strict=True) if not on]

    def second(self, sums: Sequence[Sums], work: Sequence[Work]) -> None:
        """The mean of the columns of every matrix, and the Σu² of every slice."""
        n = self.matrix_count
        buffer = torch.zeros(2 * n + len(self.stacked), dtype=self.dtype, device=self.device)
        slices = torch.zeros(self.slice_count, dtype=self.dtype, device=self.device)
        starts: list[Tensor | None] = [None] * len(work)
        weighted, means, u2 = list(starts), list(starts), list(starts)
        for k, (its, w) in enumerate(zip(sums, work, strict=True)):
            if its.columns is not None and its.weighted is not None and its.rows is not None:
                layout = w.layout
                if _begins_rows(w):
                    starts[k] = total(its.rows, layout.rows)
                weighted[k], mean = its.weighted, its.columns / layout.m
                means[k], u2[k] = mean, mean * its.weighted  # of what is whole here
        for room in self.matrices:
            room.add(buffer[:n], starts)
            room.add(buffer[n : 2 * n], weighted)
            for box, mine, _ in room.spots:
                if (value := u2[box]) is not None:
                    value.view(-1)[mine] = 0
        u2 = [None if value is None else total(value, w.layout.whole) for value, w in zip(u2, work, strict=True)]
        for room in self.slices:
            room.add(slices, u2)
        buffer[2 * n :] = slices[self.stacked]
        self._add_up(buffer)
        mu = buffer[:n] / self.rows
        slices.zero_().index_add_(0, self.slice_of, mu * buffer[n : 2 * n])
        slices[self.stacked] += buffer[2 * n :]
        for matrices, room in zip(self.matrices, self.slices, strict=True):
            matrices.take(mu, means)
            room.take(slices, u2)
        for number, member in enumerate(self.members):
            for k in member.boxes:
                if (value := u2[k]) is not None:
                    nan = 0 if self.nan is None else self.nan[number].to(value.device)
                    sums[k].mu, sums[k].u2 = means[k], value + nan


def _kinds(layout: Layout, scaled: bool) -> Iterator[tuple[str, Shape]]:
    """What the first round adds up, and the axes that each lacks."""
    if scaled:
        yield "Q", layout.whole
    if layout.factored:
        yield "rows", layout.columns
        yield "S", layout.rows
    else:
        yield "u2", layout.whole


def _begins_rows(w: Work) -> bool:
    """Whether the rows of a box begin in it, as every row does in one box."""
    return not any(w.layout.offset[axis] for axis in w.layout.columns)  # type: ignore[attr-defined]


class FlatStep:
    """What updates a list of flat parameters.

    Attributes:
        at: the place of every one in the list of gradients.
    """

    def __init__(self, params: Sequence[FlatParam], at: Sequence[int], grads: Sequence[Tensor | None]) -> None:
        self.params, self.at = params, at
        self._witness = Witness(params)
        work: list[Work] = []
        members: dict[tuple[int, ...], list[Member]] = {}
        self._places: list[tuple[int, int, Shape]] = []  # flat parameter, beginning there, shape of every box
        self._counts: list[
            tuple[Tensor, list[Tensor], int]
        ] = []  # of every tensor here: its step, its boxes', the first
        for number, param in enumerate(params):
            group = param.spans.group
            ranks = () if group is None else tuple(dist.get_process_group_ranks(group))
            for k, (flat, works) in enumerate(zip(param.flats, param.works, strict=True)):
                members.setdefault(ranks, []).append(Member(flat, number, range(len(work), len(work) + len(works))))
                begin = param.spans.spans[k].at
                for w in works:
                    self._places.append((number, begin, tuple(w.layout.shape)))
                    begin += w.layout.size
                if works:
                    copies = [w.state["step"] for w in works]
                    self._counts.append((param.state["step"].view(-1)[k], copies, len(work)))
                work += works
        self.reducers = [Reducer(params[its[0].param].spans.group, its, params) for its in members.values()]
        self.plan = Plan(work, self._cut(grads))
        self._summed = summed(param.draft for param in params)

    def agree(self) -> None:
        """Compare with the other processes what is about to be added up.

        Raises:
            RuntimeError: they would add up something else; on every one of them.
        """
        for reducer in self.reducers:
            described = []
            for member in reducer.members:
                flat, param = member.flat, self.params[member.param]
                span = param.spans.spans[next(k for k, its in enumerate(param.flats) if its is flat)]
                sides = f"rows {flat.given.rows}, columns {flat.given.columns}"
                where = f"{span.name} {span.shape} of {param.param.dtype} cut at {span.intervals}, {sides}"
                described.append(f"{where}\t, {param.draft.settings}")
            if reducer.group is not None:
                check(described, reducer.group, reducer.device)

    def current(self, grads: Sequence[Tensor | None], state: Mapping[Tensor, dict[str, Any]], dense: bool) -> bool:
        """Whether nothing has moved; ``dense``: and all gradients are there in the order of memory."""
        if self._summed != summed(param.draft for param in self.params) or self._witness.moved():
            return False
        if not all(param.owns(state.get(param.param, {})) for param in self.params):
            return False
        here = [grad for k in self.at if (grad := grads[k]) is not None]
        return not dense or (len(here) == len(self.at) and self._witness.fits(here))

    def _cut(self, grads: Sequence[Tensor | None]) -> list[Tensor]:
        """The gradient of every box."""
        whole = [absent(p.param) if (g := grads[k]) is None else g for p, k in zip(self.params, self.at, strict=True)]
        return [whole[number][begin : begin + prod(shape)].view(shape) for number, begin, shape in self._places]

    def check(self) -> None:
        """`Plan.check`, of what the state says now."""
        for step, copies, _ in self._counts:
            for copy in copies:
                copy.copy_(step)
        self.plan.check()

    def step(
        self,
        grads: Sequence[Tensor | None],
        state: Mapping[Tensor, dict[str, Any]],
        skipped: Callable[[torch.device], Tensor],
    ) -> None:
        """One update, after `check`, of every tensor that has a gradient on any process."""
        plan, work = self.plan, self.plan.work
        present = [grads[k] is not None for k in self.at]
        try:
            sums = plan.measure(self._cut(grads))
            gone = [member for reducer in self.reducers for member in reducer.first(sums, work, present)]
            left_out = {k for member in gone for k in member.boxes}
            plan.measure_again()
            plan.finish_columns()
            for reducer in self.reducers:
                reducer.second(sums, work)
            plan.apply(lambda device: torch.zeros((), dtype=torch.int64, device=device), left_out)
        finally:
            plan.release()
        for step, (copy, *_), box in self._counts:
            if box not in left_out:
                skipped(step.device).add_((step == copy).to(torch.int64))
                step.copy_(copy)
        for number, param in enumerate(self.params):
            absent_here = [member for member in gone if member.param == number]
            if param.param.numel() and len(absent_here) < len(param.flats):
                state[param.param].update(param.state)
