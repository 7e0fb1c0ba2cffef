"""The statistics of flat parameters as those of whole tensors, which any number of processes can cut again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from adafactor.core.factoring import Shape
from adafactor.core.intervals import FlatPlacement
from adafactor.engine.torch.blocks import kept
from adafactor.engine.torch.sharded.held import Held, Sharded
from adafactor.engine.torch.work import math_dtype

Whole = dict[str, Tensor]  # step, and the statistics by their names and shapes in the tensor's layout
STATISTICS = ("row", "column", "second_moment")


def gathered(param: Sharded) -> tuple[str, ...]:
    """The slots that engines cannot put together: those of other shapes, or that some tensors do not have."""
    return (*(("step",) if len(param.tensors) > 1 else ()), *STATISTICS)


def gather(params: Sequence[Sharded]) -> list[list[Whole]]:
    """Of every flat parameter the whole state of each of its tensors; nothing where no step was made.

    A collective: all processes of the groups call it with the same parameters in the same order. What several of them
    have is the same number, and no statistic is negative: the greatest is what one of them has.
    """
    states: list[list[Whole]] = []
    groups: dict[tuple[int, ...], tuple[dist.ProcessGroup, list[Whole]]] = {}
    for param in params:
        wholes: list[Whole] = []
        for step, held in zip(param.state["step"].view(-1), param.tensors, strict=True):
            flat, whole = _flat(held), {"step": step.cpu() * bool(held.works)}
            for slot, shape in flat.given.slots.items():
                whole[slot] = torch.zeros(shape, dtype=math_dtype(param.param.dtype))
                room, lacks = _room(flat, whole[slot], slot)
                for box, w in zip(flat.parts, held.works, strict=True):
                    room[box.within(lacks)] = w.state[flat.here(slot)].view(kept(box, lacks)).cpu()
            wholes.append(whole)
        states.append(wholes)
        if (group := param.group) is not None and group.size() > 1:
            groups.setdefault(tuple(dist.get_process_group_ranks(group)), (group, []))[1].extend(wholes)
    for group, all_wholes in groups.values():
        _greatest([whole["step"] for whole in all_wholes], group)
        _greatest([whole[slot] for whole in all_wholes for slot in whole if slot != "step"], group)
    return [wholes if any(bool(whole["step"]) for whole in wholes) else [] for wholes in states]


def cut(param: Sharded, wholes: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    """What a flat parameter's state has of its tensors'.

    Raises:
        ValueError: they are other tensors.
    """
    made: dict[str, Tensor] = {}
    if len(wholes) != len(param.tensors):
        raise ValueError(f"{len(param.tensors)} tensors, got {len(wholes)}")
    for slot in ("step", *STATISTICS):
        if slot not in param.state:
            continue
        like = param.state[slot]
        pieces = [like.new_zeros(0)]
        for flat, whole in zip(map(_flat, param.tensors), wholes, strict=True):
            if slot == "step":
                pieces.append(torch.as_tensor(whole["step"]).view(1))
            elif slot in flat.given.slots and flat.parts:
                shape = flat.given.slots[slot]
                value = whole.get(slot)
                if not isinstance(value, Tensor) or tuple(value.shape) != shape:
                    raise ValueError(f"{slot} of shape {shape}, got {tuple(getattr(value, 'shape', ()))}")
                if flat.given.factored:
                    room, lacks = _room(flat, value, slot)
                    pieces.append(room[flat.hull.within(lacks)].reshape(-1))
                else:
                    pieces.append(value.reshape(-1)[slice(*flat.intervals[flat.rank])])
        made[slot] = torch.cat([piece.to(like.device, like.dtype) for piece in pieces]).view(like.shape)
    return made


def _flat(held: Held) -> FlatPlacement:
    assert isinstance(held.placement, FlatPlacement)
    return held.placement


def _room(flat: FlatPlacement, whole: Tensor, slot: str) -> tuple[Tensor, Shape]:
    """A whole statistic as a view with the axes of the layout of intervals, and those that it lacks."""
    lacks = flat.layout.lacks(flat.here(slot))
    return whole.view(kept(flat.layout, lacks)), lacks


def _greatest(values: Sequence[Tensor], group: dist.ProcessGroup) -> None:
    """Everybody's greatest, in place."""
    if not values:
        return
    device = next((each for each in group._device_types if each.type == "cpu"), group._device_types[0])
    buffer = torch.cat([value.view(-1) for value in values]).to(device)
    dist.all_reduce(buffer, op=dist.ReduceOp.MAX, group=group)
    for value, part in zip(values, torch.split(buffer, [value.numel() for value in values]), strict=True):
        value.view(-1).copy_(part)
