"""What the ranks of test_released.py run: gradient release under FSDP2, tensor parallelism and DDP."""

from __future__ import annotations

from typing import Any

import models
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.fsdp import CPUOffloadPolicy, FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor

from adafactor.torch import Adafactor, step_in_backward


def local(x: torch.Tensor) -> torch.Tensor:
    return x.detach().to_local() if isinstance(x, DTensor) else x.detach()


def different(model: nn.Module, optimizer: Adafactor, other: nn.Module, its: Adafactor) -> list[str]:
    """The names of parameters that differ in a bit of theirs or of their state."""
    names = []
    for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        same = torch.equal(local(p), local(q)) and optimizer.state[p].keys() == its.state[q].keys()
        same = same and all(torch.equal(local(v), local(its.state[q][slot])) for slot, v in optimizer.state[p].items())
        if not same:
            names.append(name)
    return names


class Count:
    """All-reduces, while it is entered."""

    def __enter__(self) -> Count:
        self.calls, self._all_reduce = 0, dist.all_reduce

        def counting(*arguments: Any, **more: Any) -> Any:
            self.calls += 1
            return self._all_reduce(*arguments, **more)

        dist.all_reduce = counting
        return self

    def __exit__(self, *_: object) -> None:
        dist.all_reduce = self._all_reduce


def train(rank: int, world: int) -> dict[str, Any]:
    """Per kind of sharding: what differs from the ordinary step, gradients left, and all-reduces of a later step."""
    results: dict[str, Any] = {}
    for kind in (
        "FSDP2",
        "HSDP",
        "TP",
        "bfloat16",
        "offload",
        "no sync",
        "accumulate",
        "steps of 2",
        "framework",
        "reloaded",
    ):
        runs: list[Any] = []
        for release in (False, True):
            layout = kind if kind in ("HSDP", "TP") else "FSDP2"
            if kind == "offload":
                model = models.Model(2)
                for module in (*model.blocks, model):
                    fully_shard(module, offload_policy=CPUOffloadPolicy(pin_memory=False))
            else:
                model = models.sharded(layout, world, 2)
            if kind == "bfloat16":
                model.bfloat16()
            options: dict[str, Any] = {"compensated": True} if kind == "bfloat16" else {"beta1": 0.9}
            optimizer = Adafactor(model.parameters(), lr=1e-2, **options)
            arguments: dict[str, Any] = {"accumulation_steps": 2} if kind == "steps of 2" else {}
            arguments |= {"loop": "framework"} if kind == "framework" else {}
            released = step_in_backward(model, optimizer, **arguments) if release else None
            for step in range(4):
                rows = models.share_of_batch(layout, rank, world)
                with Count() as count:
                    if kind == "no sync":
                        model.set_requires_gradient_sync(False)
                        models.backward(model, step + 10, rows)
                        model.set_requires_gradient_sync(True)
                    elif kind == "accumulate" and released is not None:
                        with released.accumulate():
                            models.backward(model, step + 10, rows)
                    elif kind in ("accumulate", "steps of 2"):
                        models.backward(model, step + 10, rows)
                    models.backward(model, step, rows)
                    if released is None or kind == "framework":
                        optimizer.step()
                        optimizer.zero_grad()
                if kind == "reloaded" and step == 1:
                    whole = StateDictOptions(full_state_dict=True)
                    saved = get_optimizer_state_dict(model, optimizer, options=whole)
                    if released is not None:
                        released.remove()
                    optimizer = Adafactor(model.parameters(), lr=1e-2, **options)
                    options_ = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
                    set_optimizer_state_dict(model, optimizer, saved if rank == 0 else {}, options=options_)
                    released = step_in_backward(model, optimizer) if release else None
            left = [name for name, p in model.named_parameters() if p.grad is not None]
            runs += [model, optimizer]
            results[f"{kind}: gradients left"] = left
            results[f"{kind}: all-reduces {release}"] = count.calls
        results[f"{kind}: different"] = different(*runs)
    return results


def clipped(rank: int, world: int) -> dict[str, Any]:
    """Per kind: how far clipping by the norm of all gradients is from that of whole ones and step(), and the norms.

    One parameter is nobody's: it gets the gradients of one pass.
    """
    distances: dict[str, Any] = {}
    for kind in ("FSDP2", "HSDP", "TP", "FSDP2, accumulated"):
        layout, micro = kind.partition(",")[0], 2 if "accumulated" in kind else 1
        runs, norms = [], []
        for release in (False, True):
            model = models.sharded(layout, world, 2)
            *params, nobodys = model.parameters()
            optimizer = Adafactor(params, lr=1e-2)
            options = {"max_norm": 0.05, "accumulation_steps": micro}
            released = step_in_backward(model, optimizer, **options) if release else None
            rows = models.share_of_batch(layout, rank, world)
            for step in range(3):
                for k in range(micro):
                    loss = models.loss_of(model, micro * step + k, rows)
                    norm = loss.backward() if released is None else released.backward(loss)
                if released is None:
                    grads = [p.grad for p in params]  # clip_grad_norm_ does not take them of several meshes
                    wholes = [grad.full_tensor() if isinstance(grad, DTensor) else grad for grad in grads]
                    norm = torch.stack([whole.norm() for whole in wholes]).norm()
                    for grad in grads:
                        local(grad).mul_((0.05 / (norm + 1e-6)).clamp(max=1.0))
                    optimizer.step()
                    optimizer.zero_grad()
            norms.append(float(norm))
            runs.append([local(p).clone() for p in (*params, nobodys.grad)])
        pairs = zip(*runs, strict=True)
        distances[kind] = max(float((a - b).norm() / a.norm().clamp(min=1e-3)) for a, b in pairs if a.numel()), norms
    return distances


class Half(nn.Module):
    """Uses one of its two layers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.used, self.unused = nn.Linear(4, 6), nn.Linear(4, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.used(x)


def unused(rank: int, world: int) -> dict[str, Any]:
    """A module of which some parameters get no gradient: they are not waited for."""
    runs: list[Any] = []
    for release in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(Half(), nn.Linear(6, 4), Half())
        for module in (model[0], model[2]):
            fully_shard(module)
        fully_shard(model)
        optimizer = Adafactor(model.parameters(), lr=1e-2)
        released = step_in_backward(model, optimizer) if release else None
        for step in range(3):
            model(torch.ones(2, 4) * (rank + step)).square().sum().backward()
            if released is None:
                optimizer.step()
                optimizer.zero_grad()
        runs += [model, optimizer]
        left = [name for name, p in model.named_parameters() if p.grad is not None]
    return {"different": different(*runs), "left": left, "state": sum(map(bool, optimizer.state.values()))}


def refusals(rank: int, world: int) -> dict[str, str]:
    """DDP that comes later or averages in a way of its own, and FSDP1."""
    told = {}

    def attempt(case: str, model: nn.Module, trained: nn.Module, wrap_later: bool = False) -> None:
        params = list(trained.parameters())
        before = [p.detach().clone() for p in params]
        optimizer = Adafactor(params)
        try:
            released = step_in_backward(model, optimizer)
            runner = nn.parallel.DistributedDataParallel(trained) if wrap_later else model
            runner(torch.ones(2, 4)).sum().backward()
            released.remove()
            told[case] = "no error"
        except RuntimeError as error:
            same = all(torch.equal(a, b) for a, b in zip(before, params, strict=True))
            told[case] = f"{error}" if same and not optimizer.state else "something was written"

    def plain() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))

    attempt("plain", *[plain()] * 2)
    inner = plain()
    attempt("static", nn.parallel.DistributedDataParallel(inner, static_graph=True), inner)
    part = nn.Sequential(nn.parallel.DistributedDataParallel(plain()), nn.Linear(4, 4))
    attempt("part", part, part)
    later = plain()
    attempt("later", later, later, wrap_later=True)
    for original in (False, True):
        flat = FullyShardedDataParallel(plain(), device_id=torch.device("cpu"), use_orig_params=original)
        attempt(f"FSDP1 {original}", flat, flat)
    return told


def everything(rank: int, world: int) -> dict[str, Any]:
    return {
        "clipped": clipped(rank, world),
        "train": train(rank, world),
        "unused": unused(rank, world),
        "refusals": refusals(rank, world),
    }
