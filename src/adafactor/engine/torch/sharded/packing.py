"""One buffer and one all-reduce for the sums of all parameters that a group of processes shares."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from adafactor.core.factoring import Shape
from adafactor.engine.torch.sharded.placement import Placement


@dataclass(frozen=True, slots=True)
class Slot:
    """Where a value has its place in the buffer.

    Attributes:
        shape: of the slot, in which the values of all processes have their places.
        place: of this process's value; ``None`` for all of it.
        contributes: whether this process adds its value, or leaves that to another that has the same.
    """

    shape: Shape
    place: tuple[slice, ...] | None
    contributes: bool

    def here(self, buffer: Tensor) -> Tensor:
        """This process's part of a sum, without the axis of copies."""
        return buffer[0] if self.place is None else buffer[self.place][0]

    def copy(self, buffer: Tensor) -> Tensor:
        """The whole sum of this process's copy."""
        return buffer[0] if self.place is None else buffer[self.place[0]][0]


def slot_of(
    placement: Placement, reduced: Shape, group: Shape, summed: Shape = (), copy: tuple[int, int] = (0, 1)
) -> Slot:
    """The slot of a value with ``reduced`` axes of length 1; see `Placement.buffer` and `Placement.contributes`.

    Args:
        copy: which of how many copies of the slot is this process's; each is a sum of its own. It is axis 0.
    """
    shape, place = placement.buffer(reduced, group)
    shape, place = (copy[1], *shape), (slice(copy[0], copy[0] + 1), *place)
    fills = all(part.start == 0 and part.stop == n for part, n in zip(place, shape, strict=True))
    return Slot(shape, None if fills else place, placement.contributes(group, summed))


@dataclass(slots=True)
class AllReduce:
    """Where sums go.

    Attributes:
        group: the processes.
        device: where their backend wants its tensors, which is not where CPU-offloaded parameters are.
        dtype: of the buffer.
    """

    group: dist.ProcessGroup
    device: torch.device
    dtype: torch.dtype

    def add(self, slots: Sequence[Slot], values: Sequence[Tensor]) -> list[Tensor]:
        """The sums of every slot over the group, each of its slot's shape: one all-reduce."""
        parts = []
        for slot, value in zip(slots, values, strict=True):
            if slot.contributes and slot.place is None:
                parts.append(value.reshape(-1).to(self.device, self.dtype))
                continue
            room = torch.zeros(slot.shape, dtype=self.dtype, device=self.device)
            if slot.contributes and slot.place is not None:
                room[slot.place] = value.to(self.device, self.dtype)
            parts.append(room.view(-1))
        buffer = torch.cat(parts)
        dist.all_reduce(buffer, group=self.group)
        sums = torch.split(buffer, [part.numel() for part in parts])
        return [part.view(slot.shape) for slot, part in zip(slots, sums, strict=True)]
