"""What the ranks of test_flat.py run under FSDP1, beside one process that sees all of the batch."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as checkpoint
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecision, ShardingStrategy, StateDictType
from torch.distributed.fsdp.wrap import ModuleWrapPolicy

from adafactor.torch import Adafactor

warnings.filterwarnings("ignore")


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(13), nn.Linear(13, 29), nn.Linear(29, 13, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(self.norm(x))))


def model() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(7, 13), Block(), Block(), nn.Linear(13, 5))


def batches(steps: int, rows: int = 12) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(7)
    return [
        (torch.randn(rows, 7, generator=generator), torch.randn(rows, 5, generator=generator)) for _ in range(steps)
    ]


def loss(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return ((net(x) - y) ** 2).mean()


def alone(steps: int, **arguments: Any) -> dict[str, Tensor]:
    net = model()
    optimizer = Adafactor(net.parameters(), **arguments)
    for x, y in batches(steps):
        optimizer.zero_grad()
        loss(net, x, y).backward()
        optimizer.step()
    return {name: param.detach() for name, param in net.named_parameters()}


def wrapped(world: int, orig: bool, strategy: str, half: bool) -> FullyShardedDataParallel:
    mesh = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("copy", "shard")) if "HYBRID" in strategy else None
    return FullyShardedDataParallel(
        model(),
        auto_wrap_policy=ModuleWrapPolicy({Block}),
        use_orig_params=orig,
        device_id=torch.device("cpu"),
        sharding_strategy=ShardingStrategy[strategy],
        mixed_precision=MixedPrecision(param_dtype=torch.bfloat16, reduce_dtype=torch.float32) if half else None,
        device_mesh=mesh,
    )


def whole(net: FullyShardedDataParallel) -> dict[str, Tensor]:
    with FullyShardedDataParallel.state_dict_type(net, StateDictType.FULL_STATE_DICT):
        return {name: value.clone() for name, value in net.state_dict().items()}


def distance(ours: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    a, b = (torch.cat([values[name].reshape(-1) for name in sorted(expected)]) for values in (ours, expected))
    return float((a - b).norm() / b.norm())


def train(
    rank: int, world: int, orig: bool, strategy: str = "FULL_SHARD", half: bool = False, steps: int = 20
) -> dict[str, Any]:
    """The distance from one process, which takes the very gradients where bfloat16 made them."""
    arguments = {"lr": 0.1}
    net = wrapped(world, orig, strategy, half)
    optimizer = Adafactor(net.parameters(), **arguments)
    copy = model() if half else None
    reference = Adafactor(copy.parameters(), **arguments) if copy is not None else None
    for x, y in batches(steps):
        optimizer.zero_grad()
        loss(net, x.chunk(world)[rank], y.chunk(world)[rank]).backward()
        if copy is not None and reference is not None:
            with FullyShardedDataParallel.summon_full_params(net, with_grads=True):
                for (name, param), full in zip(copy.named_parameters(), net.parameters(), strict=True):
                    assert param.shape == full.shape, name
                    param.grad = None if full.grad is None else full.grad.clone()
            reference.step()
        optimizer.step()
    expected = alone(steps, **arguments) if copy is None else {n: p.detach() for n, p in copy.named_parameters()}
    return {
        "distance": distance(whole(net), expected),
        "state": sorted({s for held in optimizer.state.values() for s in held}),
    }


def save(rank: int, world: int, orig: bool, path: str, steps: int, arguments: dict[str, Any]) -> None:
    net = wrapped(world, orig, "FULL_SHARD", False)
    optimizer = Adafactor(net.parameters(), **arguments)
    run(net, optimizer, rank, world, 0, steps)
    with FullyShardedDataParallel.state_dict_type(net, StateDictType.FULL_STATE_DICT):
        saved = {"model": net.state_dict(), "optimizer": FullyShardedDataParallel.optim_state_dict(net, optimizer)}
    if rank == 0:
        torch.save(saved, path)


def resume(rank: int, world: int, orig: bool, path: str, steps: tuple[int, int], arguments: dict[str, Any]) -> float:
    net = wrapped(world, orig, "FULL_SHARD", False)
    optimizer = Adafactor(net.parameters(), **arguments)
    saved = torch.load(Path(path), weights_only=True)
    with FullyShardedDataParallel.state_dict_type(net, StateDictType.FULL_STATE_DICT):
        net.load_state_dict(saved["model"])
        loaded = FullyShardedDataParallel.optim_state_dict_to_load(net, optimizer, saved["optimizer"])
    optimizer.load_state_dict(loaded)
    run(net, optimizer, rank, world, *steps)
    return distance(whole(net), alone(steps[1], **arguments))


def save_distributed(rank: int, world: int, orig: bool, path: str, arguments: dict[str, Any]) -> None:
    net = wrapped(world, orig, "FULL_SHARD", False)
    optimizer = Adafactor(net.parameters(), **arguments)
    run(net, optimizer, rank, world, 0, 10)
    checkpoint.save(dict(zip(("model", "optimizer"), get_state_dict(net, optimizer), strict=True)), checkpoint_id=path)


def resume_distributed(rank: int, world: int, orig: bool, path: str, arguments: dict[str, Any]) -> float:
    net = wrapped(world, orig, "FULL_SHARD", False)
    optimizer = Adafactor(net.parameters(), **arguments)
    held = dict(zip(("model", "optimizer"), get_state_dict(net, optimizer), strict=True))
    checkpoint.load(held, checkpoint_id=path)
    set_state_dict(net, optimizer, model_state_dict=held["model"], optim_state_dict=held["optimizer"])
    run(net, optimizer, rank, world, 10, 20)
    return distance(whole(net), alone(20, **arguments))


def run(net: nn.Module, optimizer: Adafactor, rank: int, world: int, first: int, last: int) -> None:
    for x, y in batches(last)[first:]:
        optimizer.zero_grad()
        loss(net, x.chunk(world)[rank], y.chunk(world)[rank]).backward()
        optimizer.step()
