"""What the ranks of test_checkpoints.py run: a few steps, from one checkpoint to the next, on any number of ranks."""

from __future__ import annotations

from typing import Any

import models
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    get_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from torch.distributed.tensor import DTensor

import adafactor.torch
from adafactor.core.factoring import layout
from adafactor.engine.torch.sharded.dtensor import placement_of


def give_gradients(model: torch.nn.Module, step: int) -> None:
    """The same gradients on any number of ranks."""
    random = torch.Generator().manual_seed(step)
    for p in model.parameters():
        g = torch.randn(p.shape, generator=random)
        if isinstance(p, DTensor):
            part = placement_of(p, layout(p.shape)).part
            local = g[tuple(slice(o, o + n) for o, n in zip(part.offset, part.shape, strict=True))].contiguous()
            g = DTensor.from_local(local, p.device_mesh, p.placements, shape=g.shape, stride=g.stride())
        p.grad = g.to(p.dtype)


def steps(
    rank: int, world: int, kind: str, first: int, last: int, load: str | None, save: str | None, half: bool = False
) -> dict[str, Any]:
    model = models.Model(2) if world == 1 else models.sharded(kind, world, 2)
    if half:
        model.bfloat16()
    optimizer = adafactor.torch.Adafactor(model.parameters(), lr=0.05, beta1=0.9, compensated=half)
    if load:
        weights, state = get_state_dict(model, optimizer)
        dcp.load({"model": weights, "optimizer": state}, checkpoint_id=load)
        set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=state)
    for step in range(first, last + 1):
        give_gradients(model, step)
        optimizer.step()
    if save:
        weights, state = get_state_dict(model, optimizer)
        dcp.save({"model": weights, "optimizer": state}, checkpoint_id=save)
    whole = StateDictOptions(full_state_dict=True)
    trained = {"model": get_model_state_dict(model, options=whole)}
    trained["optimizer"] = get_optimizer_state_dict(model, optimizer, options=whole)
    if world > 1:  # a whole state goes back into shards
        model.zero_grad()
        again = adafactor.torch.Adafactor(model.parameters(), lr=0.05, beta1=0.9, compensated=half)
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
        set_optimizer_state_dict(model, again, trained["optimizer"] if rank == 0 else {}, options=options)
        for p, values in optimizer.state.items():
            for name, value in values.items():
                other = again.state[p][name]
                if isinstance(value, DTensor):
                    assert other.placements == value.placements, (name, other.placements, value.placements)
                    value, other = value.to_local(), other.to_local()
                assert torch.equal(value, other), name
    return trained if rank == 0 else {}
