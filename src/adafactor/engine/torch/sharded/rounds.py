"""What a round adds up: numbers of all tensors in one buffer, from the `Sums` of their parts and back into them.

What is completed is what finish reads. Of a tensor that is cut along both sides W is not sent: with S everybody has the
finished columns of its matrices, and Σ W / column adds up as W does. The mean of the columns is that of the rows, each
of which counts where it begins.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from adafactor.core.placement import Placement, Shared
from adafactor.engine.torch.blocks import total
from adafactor.engine.torch.sharded.held import Held, Sharded
from adafactor.engine.torch.work import Settings, Sums, Work

Values = Sequence[Tensor | None]  # of every part in the plan


@dataclass(frozen=True, slots=True, eq=False)
class Member:
    """One tensor in a sum.

    Attributes:
        sharded: what is here of its parameter, which has this ``number``; ``held``: what is here of it.
        works: the places of its parts in the plan.
        adds: whether its parts are added, or another process has the same and adds it.
        copy: which of how many sums of this tensor in one buffer is meant, where the buffer's group is larger.
    """

    sharded: Sharded
    number: int
    held: Held
    works: range
    adds: bool = True
    copy: tuple[int, int] = (0, 1)

    @property
    def placement(self) -> Placement:
        return self.held.placement

    @property
    def settings(self) -> Settings:
        return self.sharded.draft.settings


class Room:
    """Some numbers of a buffer, and what a tensor's parts add to them.

    Attributes:
        all, own: where in the buffer all copies of the sum lie, and this process's.
    """

    def __init__(self, member: Member, shared: Shared, first: int) -> None:
        size, (copy, copies) = shared.size, member.copy
        self.all = range(first, first + size * copies)
        self.own = range(first + size * copy, first + size * (copy + 1))
        self._member, self._shared = member, shared

    def open(self, buffer: Tensor) -> None:
        """Take the room's place in a buffer."""
        own = buffer[self.own.start : self.own.stop]
        # Of every part its place in the plan, which of its numbers (None: all), and those of the sum.
        self._spots: list[tuple[int, slice | Tensor | None, Tensor, Tensor | None]] = []
        for spot in self._shared.spots:
            mine, there = (torch.from_numpy(k) if isinstance(k, np.ndarray) else k for k in (spot.mine, spot.there))
            room, there = (own, there) if isinstance(there, Tensor) else (own[there], None)
            self._spots.append((self._member.works[spot.part], mine, room, there))
        del self._shared

    def add(self, values: Values) -> None:
        for part, mine, room, there in self._spots if self._member.adds else ():
            if (value := values[part]) is not None:
                value = value.reshape(-1) if mine is None else value.reshape(-1)[mine]
                value = value.to(room.device, room.dtype)
                if there is None:
                    room += value
                else:
                    room[there] += value

    def take(self, values: Values) -> None:
        """Complete the values."""
        for part, mine, room, there in self._spots:
            if (value := values[part]) is not None:
                sums = room if there is None else room[there]
                if mine is None:
                    value.copy_(sums.view(value.shape))
                else:
                    value.view(-1)[mine] = sums.to(value.device, value.dtype)

    def clear(self, values: Values) -> None:
        """Make 0 of what others have a part in."""
        for part, mine, _, _ in self._spots:
            if (value := values[part]) is not None:
                value.view(-1)[slice(None) if mine is None else mine] = 0


class Buffer:
    """Rooms side by side, behind ``size`` other numbers."""

    def __init__(self, size: int = 0) -> None:
        self.size = size
        self._rooms: list[Room] = []

    def room(self, member: Member, shared: Shared) -> Room:
        self._rooms.append(Room(member, shared, self.size))
        self.size += len(self._rooms[-1].all)
        return self._rooms[-1]

    def opened(self, like: Tensor, more: int = 0) -> Tensor:
        """The buffer, with some numbers more behind the rooms."""
        buffer = like.new_zeros(self.size + more)
        for room in self._rooms:
            room.open(buffer)
        return buffer


class First:
    """The first round: what `Placement.first` names, behind two flags of every tensor.

    Attributes:
        buffer: what is added up between `fill` and `complete`.
    """

    def __init__(self, members: Sequence[Member], like: Tensor) -> None:
        self._members = members
        buffer = Buffer(2 * len(members))
        self._rooms: list[tuple[str, Room]] = []
        ends = [buffer.size]
        for member in members:
            for name, axes in member.placement.first(member.settings.hyperparameters.scale_parameter):
                self._rooms.append((name, buffer.room(member, member.placement.shared(axes))))
            ends.append(buffer.size)
        self.buffer = buffer.opened(like)
        self._spoilt, self._present, self._sums = torch.tensor_split(self.buffer, (len(members), ends[0]))
        self._lengths = _numbers((end - begin for begin, end in pairwise(ends)), like)
        self._owner = _numbers((k for k, member in enumerate(members) for _ in member.works), like)
        self._skips = _numbers((member.settings.skip_nonfinite for member in members), like).bool()
        self._checked = [(k, member.placement.cut == "nothing") for member in members for k in member.works]

    def fill(self, sums: Sequence[Sums], present: Sequence[bool]) -> None:
        """Add what is here; ``present``: of every parameter, whether it has a gradient."""
        self.buffer.zero_()
        checks = [_check(sums[k], alone).to(self.buffer.device, self.buffer.dtype) for k, alone in self._checked]
        if checks:
            self._spoilt.index_add_(0, self._owner, (~torch.stack(checks).isfinite()).to(self.buffer.dtype))
        self._present.copy_(torch.tensor([float(present[member.number]) for member in self._members]))
        for room, values in self._of(sums):
            room.add(values)

    def complete(self, sums: Sequence[Sums]) -> None:
        """Complete the sums, and spoil those of tensors whose gradient is not finite anywhere."""
        for room, values in self._of(sums):
            room.take(values)
        # What is finite everywhere may add up to what is not.
        ends = torch.segment_reduce(self._sums, "sum", lengths=self._lengths, unsafe=True)
        spoilt = ((self._spoilt > 0) | ~ends.isfinite()) & self._skips
        # All processes must leave alone what one of them does. On a device it is not asked, because that would wait.
        if spoilt.device.type == "cpu" and not bool(spoilt.any()):
            return
        for member, nan in zip(self._members, torch.where(spoilt, torch.nan, 0.0).unbind(), strict=True):
            for its in (sums[k] for k in member.works):
                its.nonfinite = nan.to(its.W.device, its.W.dtype)
                its.W += its.nonfinite
                if its.u2 is not None:
                    its.u2 += its.nonfinite

    def absent(self, present: Sequence[bool]) -> list[Member]:
        """The tensors without a gradient anywhere."""
        if all(present[member.number] for member in self._members):
            return []
        there = self._present.tolist()  # the only question to a device, where a gradient is missing
        return [member for member, on in zip(self._members, there, strict=True) if not on]

    def _of(self, sums: Sequence[Sums]) -> Iterator[tuple[Room, Values]]:
        values = {name: [getattr(its, name) for its in sums] for name in {name for name, _ in self._rooms}}
        return ((room, values[name]) for name, room in self._rooms)


def _check(sums: Sums, alone: bool) -> Tensor:
    """A number that is not finite where the gradient is not; ``alone``: or where W is not, which no total shows."""
    if sums.S is None:
        return sums.W.sum()
    return sums.W.sum() + sums.S.sum() if alone else sums.S.sum()


class Second:
    """The second round, of tensors that are cut along both sides: what eq. 7 adds up.

    Two numbers of every matrix that is cut, the sum of its rows and Σ W / column; of a slice with others besides, their
    part of its Σu².

    Attributes:
        buffer: what is added up between `fill` and `complete`.
    """

    def __init__(self, members: Sequence[Member], like: Tensor) -> None:
        self._works = [k for member in members for k in member.works]
        buffer, slices = Buffer(), Buffer()
        self._starts, self._weighted = (
            [buffer.room(member, member.placement.matrices) for member in members] for _ in range(2)
        )
        alone = [replace(member, adds=True, copy=(0, 1)) for member in members]
        self._slices = [slices.room(member, member.placement.slices) for member in alone]
        each = list(zip([member.placement for member in members], self._starts, self._slices, strict=True))
        stacked = [k for placement, _, room in each if placement.stacked for k in room.own]
        self._stacked = _numbers(stacked, like)
        self.buffer, self._u2 = buffer.opened(like, len(stacked)), slices.opened(like, 1)
        n = buffer.size // 2
        self._of_rows, self._of_W, self._rest = torch.tensor_split(self.buffer, (n, 2 * n))
        self._n = _numbers((placement.layout.n for placement, room, _ in each for _ in room.all), like)
        slice_of = np.full(n, slices.size)  # what is added to other copies' slices counts nowhere here
        for placement, matrices, room in each:
            slice_of[matrices.own.start : matrices.own.stop] = room.own.start + placement.slice_of
        self._slice_of = torch.from_numpy(slice_of).to(like.device)

    def fill(self, work: Sequence[Work], sums: Sequence[Sums]) -> None:
        """Add what is here, and begin with what is complete here."""
        self.buffer.zero_()
        self._u2.zero_()
        starts: list[Any] = [None] * len(work)
        of_matrices = list(starts)
        for k in self._works:
            its, layout = sums[k], work[k].layout
            assert its.rows is not None
            assert its.columns is not None
            assert its.weighted is not None
            if not any(layout.offset[axis] for axis in layout.columns):  # type: ignore[attr-defined]
                starts[k] = total(its.rows, layout.rows)
            its.mu = its.columns / layout.m
            of_matrices[k] = its.mu * its.weighted
        weighted = [its.weighted for its in sums]
        for of_rows, of_W in zip(self._starts, self._weighted, strict=True):
            of_rows.add(starts)
            of_W.add(weighted)
            of_W.clear(of_matrices)
        for k in self._works:
            sums[k].u2 = total(of_matrices[k], work[k].layout.whole)
        for room in self._slices:
            room.add([its.u2 for its in sums])
        self._rest.copy_(self._u2[self._stacked])

    def complete(self, sums: Sequence[Sums]) -> None:
        """The mean of the columns of every matrix, and Σu² of every slice."""
        self._of_rows /= self._n
        self._u2.zero_().index_add_(0, self._slice_of, self._of_rows * self._of_W)
        self._u2[self._stacked] += self._rest
        for rooms, values in ((self._starts, [its.mu for its in sums]), (self._slices, [its.u2 for its in sums])):
            for room in rooms:
                room.take(values)
        for its in (sums[k] for k in self._works):
            if its.nonfinite is not None and its.u2 is not None:
                its.u2 += its.nonfinite


def _numbers(values: Iterable[int], like: Tensor) -> Tensor:
    return torch.tensor(list(values), dtype=torch.int64, device=like.device)
