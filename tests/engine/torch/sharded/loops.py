"""What the ranks of test_loops.py run: the ways in which people train, each beside the same loop in one process."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import models
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from adafactor.torch import Adafactor

STEPS = 10
KINDS = (
    "DDP", "ZeRO", "CPU offload", "accumulation", "clipping", "checkpoint", "checkpoint_wrapper", "left whole",
)  # fmt: skip


class Recomputing(models.Block):
    """A block that keeps its input alone until the backward pass."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return checkpoint(super().forward, x, use_reentrant=False)


def sharded(kind: str, world: int) -> nn.Module:
    model = models.Model(2)
    if kind in ("DDP", "ZeRO"):
        return nn.parallel.DistributedDataParallel(model)
    mesh = init_device_mesh("cpu", (world,))
    policy = {"offload_policy": CPUOffloadPolicy(pin_memory=False)} if kind == "CPU offload" else {}
    for k, block in enumerate(model.blocks):
        if kind == "checkpoint":
            block.__class__ = Recomputing
        if kind == "checkpoint_wrapper":
            model.blocks[k] = checkpoint_wrapper(block)
        fully_shard(model.blocks[k], mesh=mesh, **policy)
    ignored = {"ignored_params": {model.words.weight}} if kind == "left whole" else {}
    return fully_shard(model, mesh=mesh, **policy, **ignored)


def average(params: Iterable[nn.Parameter], world: int) -> None:
    """What fully_shard leaves to whoever told it to ignore a parameter."""
    for p in params:
        if not isinstance(p, DTensor) and p.grad is not None:
            torch.distributed.all_reduce(p.grad)
            p.grad /= world


def every_loop(rank: int, world: int) -> dict[str, Any]:
    """The distance from one process after ten steps, and for some kinds what shows that they were what they claim."""
    distances: dict[str, Any] = {}
    rows = slice(rank * 8 // world, (rank + 1) * 8 // world)
    for kind in KINDS:
        single, many = models.Model(2), sharded(kind, world)
        one = Adafactor(single.parameters(), lr=0.05)
        if kind == "ZeRO":
            optimizer: Any = ZeroRedundancyOptimizer(many.parameters(), Adafactor, lr=0.05)
        else:
            optimizer = Adafactor(many.parameters(), lr=0.05)
        norms = []
        for step in range(STEPS):
            for optimizing in (one, optimizer):
                optimizing.zero_grad()
            models.backward(single, step)
            if kind == "accumulation":
                for k in range(2):
                    many.set_requires_gradient_sync(k == 1)
                    half = slice(rows.start + 2 * k, rows.start + 2 * k + 2)
                    models.backward(many, step, half, scale=0.5)
            else:
                models.backward(many, step, rows)
            if kind == "left whole":
                average(many.parameters(), world)
            if kind == "clipping":
                norms = [nn.utils.clip_grad_norm_(m.parameters(), 0.01) for m in (single, many)]
                norms[1] = norms[1].full_tensor()
            one.step()
            optimizer.step()
        distances[kind] = models.distance(many, single)
        if kind == "clipping":
            distances["clipped"] = [float(norm) for norm in norms]
    return distances


@contextmanager
def gloo_is_an_accelerator() -> Iterator[None]:
    """Accelerate shards for accelerators only; of a CPU with several processes it makes DDP, whatever its plugin says.

    The kind of backend is the one answer that this changes: everything after it is Accelerate's own code, on the
    device that ACCELERATE_TORCH_DEVICE names.
    """
    from accelerate import DistributedType
    from accelerate.state import PartialState

    with patch.object(PartialState, "_prepare_backend", lambda *_: ("gloo", DistributedType.MULTI_GPU)):
        yield


def accelerated(rank: int, world: int, place: str) -> dict[str, Any]:
    os.environ.update(LOCAL_RANK=str(rank), ACCELERATE_TORCH_DEVICE="cpu")
    with gloo_is_an_accelerator():
        return fsdp2_by_accelerate(rank, world, place)


def fsdp2_by_accelerate(rank: int, world: int, place: str) -> dict[str, Any]:
    """With activation checkpointing, accumulation, clipping, a schedule, and a state to resume."""
    import accelerate

    results: dict[str, Any] = {}

    def prepared() -> tuple[Any, ...]:
        plugin = accelerate.FullyShardedDataParallelPlugin(
            fsdp_version=2,
            auto_wrap_policy="transformer_based_wrap",
            transformer_cls_names_to_wrap=["Block"],
            activation_checkpointing=True,
            state_dict_type="SHARDED_STATE_DICT",
        )
        runner = accelerate.Accelerator(fsdp_plugin=plugin, gradient_accumulation_steps=2)
        model = models.Model(2)
        optimizer = Adafactor(model.parameters(), lr=0.05, beta1=0.9)
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        return runner, *runner.prepare(model, optimizer, schedule)

    def train(objects: tuple[Any, ...], first: int, last: int) -> None:
        runner, model, optimizer, schedule = objects
        for step in range(first, last):
            for k in range(2):
                start = rank * 8 // world + k * 4 // world
                with runner.accumulate(model):
                    runner.backward(models.loss_of(model, step, slice(start, start + 4 // world)))
                    runner.clip_grad_norm_(model.parameters(), 0.5)
                    optimizer.step()
                    schedule.step()
                    optimizer.zero_grad()

    objects = prepared()
    runner, model, optimizer, _ = objects
    results["fsdp2"] = runner.is_fsdp2
    results["sharded"] = [isinstance(p, DTensor) for p in model.parameters()]
    results["stepped"] = optimizer.optimizer.param_groups[0]["params"] == list(model.parameters())
    train(objects, 0, 5)
    runner.save_state(place)
    train(objects, 5, STEPS)
    single = models.Model(2)
    one = Adafactor(single.parameters(), lr=0.05, beta1=0.9)
    schedule = torch.optim.lr_scheduler.ExponentialLR(one, 0.9)
    for step in range(STEPS):
        one.zero_grad()
        models.backward(single, step)
        nn.utils.clip_grad_norm_(single.parameters(), 0.5)
        one.step()
        for _ in range(world):  # Accelerate moves a schedule once for every process
            schedule.step()
    results["distance"] = models.distance(model, single)

    again = prepared()
    train(again, 20, 22)  # a state of its own, to be overwritten
    again[0].load_state(place)
    train(again, 5, STEPS)
    results["resumed"] = models.distance(again[1], single)
    same = [
        torch.equal(a.to_local(), b.to_local()) for a, b in zip(again[1].parameters(), model.parameters(), strict=True)
    ]
    results["same bits"] = all(same)
    results["steps"] = sorted({int(s["step"]) for s in again[2].optimizer.state.values()})
    return results
