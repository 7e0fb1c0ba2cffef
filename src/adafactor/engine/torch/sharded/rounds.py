"""What a round adds up: numbers of all tensors in one buffer, from the `Sums` of their parts and back into them.

What is completed is what finish reads. Of a tensor that is cut along both sides W is not sent: with S everybody has the
finished columns of its matrices, and Σ W / column adds up as W does. The mean of the columns is that of the rows, each
of which counts where it begins.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
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
    """Some numbers of a buffer, and what a tensor's parts add to them. ``region`` is of all copies of the sum."""

    def __init__(self, member: Member, shared: Shared, region: Tensor) -> None:
        own = region.view(member.copy[1], shared.size)[member.copy[0]]
        self._adds = member.adds
        # Of every part its place in the plan, which of its numbers (None: all), and those of the sum.
        self._spots: list[tuple[int, slice | Tensor | None, Tensor, Tensor | None]] = []
        for spot in shared.spots:
            mine, there = (torch.from_numpy(k) if isinstance(k, np.ndarray) else k for k in (spot.mine, spot.there))
            room, there = (own, there) if isinstance(there, Tensor) else (own[there], None)
            self._spots.append((member.works[spot.part], mine, room, there))

    def add(self, values: Values) -> None:
        for part, mine, room, there in self._spots if self._adds else ():
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


def _rooms(of: Sequence[tuple[Member, Shared]], buffer: Tensor) -> list[Room]:
    """Side by side in a buffer."""
    regions = torch.split(buffer, [member.copy[1] * shared.size for member, shared in of])
    return [Room(member, shared, region) for (member, shared), region in zip(of, regions, strict=True)]


def _add_up(buffer: Tensor, group: dist.ProcessGroup | None) -> None:
    """What everybody gives: one all-reduce."""
    if group is not None and group.size() > 1 and len(buffer):
        dist.all_reduce(buffer, group=group)


class First:
    """The first round: what `Placement.first` names, behind two flags of every tensor."""

    def __init__(self, group: dist.ProcessGroup | None, members: Sequence[Member], like: Tensor) -> None:
        self._group = group
        self._members = members
        self._names, of, lengths = list[str](), list[tuple[Member, Shared]](), list[int]()
        for member in members:
            kinds = list(member.placement.first(member.settings.hyperparameters.scale_parameter))
            shared = [(member, member.placement.shared(axes)) for _, axes in kinds]
            self._names += [name for name, _ in kinds]
            of += shared
            lengths.append(sum(member.copy[1] * each.size for _, each in shared))
        count = len(members)
        self._buffer = like.new_zeros(2 * count + sum(lengths))
        self._spoilt, self._present, self._sums = torch.split(self._buffer, [count, count, sum(lengths)])
        self._rooms = _rooms(of, self._sums)
        self._lengths = _numbers(lengths, like)
        self._owner = _numbers((k for k, member in enumerate(members) for _ in member.works), like)
        self._skips = _numbers((member.settings.skip_nonfinite for member in members), like).bool()
        self._checked = [(k, member.placement.cut == "nothing") for member in members for k in member.works]

    def __call__(self, sums: Sequence[Sums], present: Sequence[bool]) -> list[Member]:
        """Complete the sums, and spoil those of tensors whose gradient is not finite anywhere.

        Args:
            present: of every parameter, whether it has a gradient here.

        Returns:
            The tensors without a gradient anywhere.
        """
        buffer = self._buffer.zero_()
        checks = [_check(sums[k], alone).to(buffer.device, buffer.dtype) for k, alone in self._checked]
        if checks:
            self._spoilt.index_add_(0, self._owner, (~torch.stack(checks).isfinite()).to(buffer.dtype))
        here = [present[member.number] for member in self._members]
        self._present.copy_(torch.tensor(here))
        values = {name: [getattr(its, name) for its in sums] for name in set(self._names)}
        for name, room in zip(self._names, self._rooms, strict=True):
            room.add(values[name])
        _add_up(buffer, self._group)
        for name, room in zip(self._names, self._rooms, strict=True):
            room.take(values[name])
        # What is finite everywhere may add up to what is not.
        ends = torch.segment_reduce(self._sums, "sum", lengths=self._lengths, unsafe=True)
        spoilt = ((self._spoilt > 0) | ~ends.isfinite()) & self._skips
        # All processes must leave alone what one of them does. On a device it is not asked, because that would wait.
        if spoilt.device.type != "cpu" or bool(spoilt.any()):
            for member, nan in zip(self._members, torch.where(spoilt, torch.nan, 0.0).unbind(), strict=True):
                for its in (sums[k] for k in member.works):
                    its.nonfinite = nan.to(its.W.device, its.W.dtype)
                    its.W += its.nonfinite
                    if its.u2 is not None:
                        its.u2 += its.nonfinite
        # The only question to a device, where a gradient is missing.
        there = here if all(here) else self._present.tolist()
        return [member for member, on in zip(self._members, there, strict=True) if not on]


def _check(sums: Sums, alone: bool) -> Tensor:
    """A number that is not finite where the gradient is not; ``alone``: or where W is not, which no total shows."""
    if sums.S is None:
        return sums.W.sum()
    return sums.W.sum() + sums.S.sum() if alone else sums.S.sum()


class Second:
    """The second round, of tensors that are cut along both sides: what eq. 7 adds up.

    Two numbers of every matrix that is cut, the sum of its rows and Σ W / column; of a slice with others besides, their
    part of its Σu².
    """

    def __init__(self, group: dist.ProcessGroup | None, members: Sequence[Member], like: Tensor) -> None:
        self._group = group
        self._works = [k for member in members for k in member.works]
        matrices = [(member, member.placement.matrices) for member in members]
        slices = [(replace(member, adds=True, copy=(0, 1)), member.placement.slices) for member in members]
        firsts = list(accumulate((shared.size for _, shared in slices), initial=0))
        n, slice_of, stacked = list[int](), list[int](), list[int]()
        for (member, its), (_, of), first in zip(matrices, slices, firsts, strict=False):
            numbers = np.full((member.copy[1], its.size), firsts[-1])  # other copies' slices count nowhere here
            numbers[member.copy[0]] = first + member.placement.slice_of(its, of)
            slice_of += numbers.reshape(-1).tolist()
            n += [member.placement.layout.n] * numbers.size
            stacked += range(first, first + of.size) if member.placement.stacked else ()
        self._n, self._slice_of, self._stacked = (_numbers(each, like) for each in (n, slice_of, stacked))
        self._buffer, self._u2 = like.new_zeros(2 * len(n) + len(stacked)), like.new_zeros(firsts[-1] + 1)
        self._of_rows, self._of_W, self._rest = torch.split(self._buffer, [len(n), len(n), len(stacked)])
        self._starts, self._weighted = (_rooms(matrices, half) for half in (self._of_rows, self._of_W))
        self._slices = _rooms(slices, self._u2[:-1])

    def __call__(self, work: Sequence[Work], sums: Sequence[Sums]) -> None:
        """The mean of the columns of every matrix, and Σu² of every slice."""
        self._buffer.zero_()
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
            of_W.clear(of_matrices)  # what is left is of matrices that are whole here
        for k in self._works:
            sums[k].u2 = total(of_matrices[k], work[k].layout.whole)
        for room in self._slices:
            room.add([its.u2 for its in sums])
        self._rest.copy_(self._u2[self._stacked])
        _add_up(self._buffer, self._group)
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
