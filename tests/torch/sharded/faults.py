"""What the ranks of test_faults.py run: models that disagree, flat shards, whole tensors on every rank."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor, Partial, Shard

from adafactor.torch import Adafactor


def refusal(optimizer: Adafactor) -> str:
    before = [_local(p).clone() for group in optimizer.param_groups for p in group["params"]]
    try:
        optimizer.step()
    except RuntimeError as error:
        after = [p for group in optimizer.param_groups for p in group["params"]]
        same = all(torch.equal(a, _local(b)) for a, b in zip(before, after, strict=True))
        return f"{error}" if same and not optimizer.state else "something was written"
    return "no error"


def _local(x: torch.Tensor) -> torch.Tensor:
    return x.detach().to_local() if isinstance(x, DTensor) else x.detach()


def sentences(rank: int, world: int) -> dict[str, str]:
    """What is refused, on every rank."""
    mesh = init_device_mesh("cpu", (world,))

    def parameter(*shape: int, placement: Any = Shard(0)) -> nn.Parameter:  # noqa: B008 - a value
        made = nn.Parameter(DTensor.from_local(torch.ones(shape), mesh, [placement], run_check=False))
        made.grad = DTensor.from_local(torch.ones(shape), mesh, [placement], run_check=False)
        return made

    found = {}
    found["shape"] = refusal(Adafactor([parameter(2, 3), parameter(2, 4 if rank else 3)]))
    found["missing"] = refusal(Adafactor([parameter(2, 3)] + [parameter(3, 3) for _ in range(1 - rank)]))
    found["partial"] = refusal(Adafactor([parameter(2, 3, placement=Partial())]))
    odd = DTensor.from_local(torch.ones(1 + 3 * rank, 2), mesh, [Shard(0)], shape=torch.Size((5, 2)), stride=(2, 1))
    found["cut"] = refusal(Adafactor([nn.Parameter(odd)]))
    for original in (False, True):
        torch.manual_seed(0)
        flat = FullyShardedDataParallel(nn.Linear(4, 4), device_id=torch.device("cpu"), use_orig_params=original)
        flat(torch.ones(1, 4)).sum().backward()
        found[f"FSDP1 {original}"] = refusal(Adafactor(flat.parameters()))
    return found


def whole(rank: int, world: int) -> dict[str, float]:
    """DDP, ZeroRedundancyOptimizer and CPU offload against the single process."""

    def model() -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 5))

    data = torch.randn(8, 6, generator=torch.Generator().manual_seed(1))
    found = {}
    for kind in ("DDP", "ZeRO", "CPU offload", "accumulation", "swapped"):
        single, many = model(), model()
        one = Adafactor(single.parameters(), lr=0.05)
        if kind in ("DDP", "ZeRO"):
            wrapped: nn.Module = nn.parallel.DistributedDataParallel(many)
        else:
            from torch.distributed.fsdp import CPUOffloadPolicy

            made = Adafactor(many.parameters(), lr=0.05)
            arguments = {"offload_policy": CPUOffloadPolicy(pin_memory=False)} if kind == "CPU offload" else {}
            wrapped = fully_shard(many, mesh=init_device_mesh("cpu", (world,)), **arguments)
        if kind == "ZeRO":
            optimizer: Any = ZeroRedundancyOptimizer(wrapped.parameters(), Adafactor, lr=0.05)
        elif kind == "swapped":  # what Accelerate does: it shards the model of an optimizer that exists
            made.param_groups[0]["params"] = list(wrapped.parameters())
            optimizer = made
        else:
            optimizer = Adafactor(wrapped.parameters(), lr=0.05)
        for _ in range(10):
            one.zero_grad()
            single(data).square().mean().backward()
            one.step()
            optimizer.zero_grad()
            mine = data.chunk(world)[rank]
            if kind == "accumulation":
                for k, piece in enumerate(mine.chunk(2)):
                    wrapped.set_requires_gradient_sync(k == 1)
                    (wrapped(piece).square().mean() / 2).backward()
            else:
                wrapped(mine).square().mean().backward()
            optimizer.step()
        worst = 0.0
        for a, b in zip(many.parameters(), single.parameters(), strict=True):
            full = a.full_tensor() if isinstance(a, DTensor) else a
            worst = max(worst, float(((full - b).norm() / b.norm()).detach()))
        found[kind] = worst
    dist.barrier()
    return found
