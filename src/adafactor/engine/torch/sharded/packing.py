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
class Entry:
    """A value's room in the buffer.

    Attributes:
        shape: of the room.
        place: where in it this process's value goes; ``None`` for all of it.
        speaks: whether this process adds its value, or leaves that to another that has the same.
    """

    shape: Shape
    place: tuple[slice, ...] | None
    speaks: bool

    def here(self, canvas: Tensor) -> Tensor:
        """This process's part of a sum, without the axis of copies."""
        return canvas[0] if self.place is None else canvas[self.place][0]

    def copy(self, canvas: Tensor) -> Tensor:
        """The whole sum of this process's copy."""
        return canvas[0] if self.place is None else canvas[self.place[0]][0]


def entry(
    placement: Placement, reduced: Shape, group: Shape, summed: Shape = (), copy: tuple[int, int] = (0, 1)
) -> Entry:
    """The room for a value with ``reduced`` axes of length 1; see `Placement.canvas` and `Placement.speaks`.

    Args:
        copy: which of how many copies of the room is this process's; each is a sum of its own. It is axis 0.
    """
    shape, place = placement.canvas(reduced, group)
    shape, place = (copy[1], *shape), (slice(copy[0], copy[0] + 1), *place)
    fills = all(part.start == 0 and part.stop == n for part, n in zip(place, shape, strict=True))
    return Entry(shape, None if fills else place, placement.speaks(group, summed))


@dataclass(slots=True)
class Channel:
    """Where sums go.

    Attributes:
        group: the processes.
        device: where their backend wants its tensors, which is not where CPU-offloaded parameters are.
        dtype: of the buffer.
    """

    group: dist.ProcessGroup
    device: torch.device
    dtype: torch.dtype

    def add(self, entries: Sequence[Entry], values: Sequence[Tensor]) -> list[Tensor]:
        """The sums of every entry over the group, each of its room's shape: one all-reduce."""
        parts = []
        for room, value in zip(entries, values, strict=True):
            if room.speaks and room.place is None:
                parts.append(value.reshape(-1).to(self.device, self.dtype))
                continue
            canvas = torch.zeros(room.shape, dtype=self.dtype, device=self.device)
            if room.speaks and room.place is not None:
                canvas[room.place] = value.to(self.device, self.dtype)
            parts.append(canvas.view(-1))
        buffer = torch.cat(parts)
        dist.all_reduce(buffer, group=self.group)
        sums = torch.split(buffer, [part.numel() for part in parts])
        return [part.view(room.shape) for room, part in zip(entries, sums, strict=True)]
