"""What the ranks of test_faults.py run: models that disagree, and what is no shard of anything."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor, Partial, Shard

from adafactor.torch import Adafactor


def refusal(optimizer: Adafactor, step: Callable[[], Any] | None = None) -> str:
    before = [_local(p).clone() for group in optimizer.param_groups for p in group["params"]]
    try:
        (step or optimizer.step)()
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

    told = {}
    told["shape"] = refusal(Adafactor([parameter(2, 3), parameter(2, 4 if rank else 3)]))
    told["missing"] = refusal(Adafactor([parameter(2, 3)] + [parameter(3, 3) for _ in range(1 - rank)]))
    told["partial"] = refusal(Adafactor([parameter(2, 3, placement=Partial())]))
    odd = DTensor.from_local(torch.ones(1 + 3 * rank, 2), mesh, [Shard(0)], shape=torch.Size((5, 2)), stride=(2, 1))
    told["cut"] = refusal(Adafactor([nn.Parameter(odd)]))
    piece = nn.Parameter(torch.ones(4))
    piece._fsdp_flattened, piece.grad = True, torch.ones(4)  # of a model that is not there
    told["FSDP1"] = refusal(Adafactor([piece]))
    conv = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
    net = FullyShardedDataParallel(conv, device_id=torch.device("cpu"))
    net(torch.ones(1, 3, 3, 3)).sum().backward()
    told["channels last"] = refusal(Adafactor(net.parameters()))
    net = FullyShardedDataParallel(nn.Linear(4, 4), device_id=torch.device("cpu"))
    net(torch.ones(1, 4)).sum().backward()
    told["int8"] = refusal(Adafactor(net.parameters(), beta1=0.9, momentum_dtype=torch.int8))
    compiled = Adafactor([parameter(2, 3)])
    told["compiled"] = refusal(compiled, torch.compile(compiled.step, backend="eager"))
    elsewhere, *_ = [DeviceMesh("cpu", [k]) for k in range(world)]  # every rank makes every mesh
    lone = DTensor.from_local(torch.ones(2, 3), elsewhere, [Shard(0)], run_check=False, shape=(2, 3), stride=(3, 1))
    told["elsewhere"] = refusal(Adafactor([nn.Parameter(lone)])) if rank else ""
    return told
