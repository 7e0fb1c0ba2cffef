"""The statistics of flat parameters as those of whole tensors, which any number of processes can cut again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from adafactor.core.intervals import Flat
from adafactor.engine.torch.blocks import kept
from adafactor.engine.torch.sharded.flat import FlatParam
from adafactor.engine.torch.work import math_dtype

Whole = dict[str, Tensor]  # step, and the statistics by their names and shapes in the tensor's layout


def gather(params: Sequence[FlatParam]) -> list[list[Whole]]:
    """Of every flat parameter the whole state of each of its tensors; nothing where no step was made.

    A collective: all processes of the groups call it with the same parameters in the same order. What several of them
    have is the same number, and no statistic is negative: the greatest is what one of them has.
    """
    states: list[list[Whole]] = []
    groups: dict[tuple[int, ...], tuple[dist.ProcessGroup, list[Whole]]] = {}
    for param in params:
        rooms: list[Whole] = []
        for k, (flat, works) in enumerate(zip(param.flats, param.works, strict=True)):
            whole = {"step": param.state["step"].view(-1)[k].cpu() * bool(works)}
            for slot, shape in flat.given.slots.items():
                whole[slot] = torch.zeros(shape, dtype=math_dtype(param.param.dtype))
                room, lacks = _room(flat, whole[slot], slot), _lacks(flat, slot)
                for box, w in zip(flat.boxes, works, strict=True):
                    room[box.place(lacks)] = w.state[_side(flat, slot)].view(kept(box, lacks)).cpu()
            rooms.append(whole)
        states.append(rooms)
        if (group := param.spans.group) is not None and group.size() > 1:
            groups.setdefault(tuple(dist.get_process_group_ranks(group)), (group, []))[1].extend(rooms)
    for group, wholes in groups.values():
        _greatest([whole["step"] for whole in wholes], group)
        _greatest([whole[slot] for whole in wholes for slot in whole if slot != "step"], group)
    return [rooms if any(bool(whole["step"]) for whole in rooms) else [] for rooms in states]


def cut(param: FlatParam, wholes: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    """What a flat parameter's state has of its tensors'.

    Raises:
        ValueError: they are other tensors.
    """
    made: dict[str, Tensor] = {}
    if len(wholes) != len(param.flats):
        raise ValueError(f"{len(param.flats)} tensors, got {len(wholes)}")
    for slot in ("step", "row", "column", "second_moment"):
        if slot not in param.state:
            continue
        like = param.state[slot]
        pieces = [like.new_zeros(0)]
        for flat, whole in zip(param.flats, wholes, strict=True):
            if slot == "step":
                pieces.append(torch.as_tensor(whole["step"]).view(1))
            elif slot in flat.given.slots and flat.boxes:
                shape = flat.given.slots[slot]
                value = whole.get(slot)
                if not isinstance(value, Tensor) or tuple(value.shape) != shape:
                    raise ValueError(f"{slot} of shape {shape}, got {tuple(getattr(value, 'shape', ()))}")
                if flat.given.factored:
                    value = _room(flat, value, slot)[flat.hull.place(_lacks(flat, slot))]
                else:
                    value = value.reshape(-1)[slice(*flat.intervals[flat.rank])]
                pieces.append(value.reshape(-1))
        made[slot] = torch.cat([piece.to(like.device, like.dtype) for piece in pieces]).view(like.shape)
    return made


def _side(flat: Flat, slot: str) -> str:
    """The slot's name in the layout of intervals."""
    return {"row": "column", "column": "row"}.get(slot, slot) if flat.transposed else slot


def _lacks(flat: Flat, slot: str) -> tuple[int, ...]:
    return flat.layout.lacks(_side(flat, slot))


def _room(flat: Flat, whole: Tensor, slot: str) -> Tensor:
    """A whole statistic, as a view with the axes of the layout of intervals."""
    return whole.view(kept(flat.layout, _lacks(flat, slot)))


def _greatest(values: Sequence[Tensor], group: dist.ProcessGroup) -> None:
    """Everybody's greatest, in place."""
    if not values:
        return
    device = next((each for each in group._device_types if each.type == "cpu"), group._device_types[0])
    buffer = torch.cat([value.view(-1) for value in values]).to(device)
    dist.all_reduce(buffer, op=dist.ReduceOp.MAX, group=group)
    for value, part in zip(values, torch.split(buffer, [value.numel() for value in values]), strict=True):
        value.view(-1).copy_(part)
