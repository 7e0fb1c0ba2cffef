"""A Transformer of a few thousand weights under every kind of sharding, and what its steps send."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from adafactor.core.factoring import layout
from adafactor.engine.torch.sharded.dtensor import placement_of
from adafactor.torch import Adafactor, Factored

WIDTH, WORDS, LAYERS = 16, 24, 4


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(3 * WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.tanh(self.up(self.norm(x))))


class Model(nn.Module):
    def __init__(self, layers: int = LAYERS) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words = nn.Embedding(WORDS, WIDTH)
        self.blocks = nn.Sequential(*[Block() for _ in range(layers)])
        self.head = nn.Linear(WIDTH, WORDS)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.blocks(self.words(tokens)))


KINDS = ("FSDP2", "FSDP2, columns", "TP", "HSDP", "FSDP x TP", "DDP")


def sharded(kind: str, world: int, layers: int = LAYERS) -> nn.Module:
    model = Model(layers)
    if kind == "DDP":
        return nn.parallel.DistributedDataParallel(model)
    if kind.startswith("FSDP2"):
        mesh = init_device_mesh("cpu", (world,))
    elif kind == "TP":
        tp, mesh = init_device_mesh("cpu", (world,), mesh_dim_names=("tp",)), None
    elif kind == "HSDP":
        mesh = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("replicate", "shard"))
    else:
        grid = init_device_mesh("cpu", (world // 2, 2), mesh_dim_names=("dp", "tp"))
        tp, mesh = grid["tp"], grid["dp"]
    if "TP" in kind:
        for block in model.blocks:
            parallelize_module(block, tp, {"up": ColwiseParallel(), "down": RowwiseParallel()})
    if mesh is not None:
        along = {"shard_placement_fn": lambda p: Shard(p.dim() - 1)} if kind == "FSDP2, columns" else {}
        for block in model.blocks:
            fully_shard(block, mesh=mesh, **along)
        fully_shard(model, mesh=mesh, **along)
    return model


def tokens(step: int, rows: slice = slice(None)) -> torch.Tensor:
    return torch.randint(WORDS, (8, 5), generator=torch.Generator().manual_seed(step))[rows]


def loss_of(model: nn.Module, step: int, rows: slice = slice(None)) -> torch.Tensor:
    batch = tokens(step, rows)
    return nn.functional.cross_entropy(model(batch).flatten(0, 1), batch.roll(1, 1).flatten())


def backward(model: nn.Module, step: int, rows: slice = slice(None), scale: float = 1.0) -> None:
    (scale * loss_of(model, step, rows)).backward()


def share_of_batch(kind: str, rank: int, world: int) -> slice:
    """The rows of the batch for this rank: the same for all that hold pieces of the same copy."""
    parts, mine = {"TP": (1, 0), "FSDP x TP": (world // 2, rank // 2)}.get(kind, (world, rank))
    return slice(mine * 8 // parts, (mine + 1) * 8 // parts)


@torch.no_grad()
def distances(model: nn.Module, single: nn.Module) -> tuple[float, float]:
    """The relative difference by norm, of all parameters as one vector and of the parameter where it is largest."""
    norms = []
    for a, b in zip(model.parameters(), single.parameters(), strict=True):
        full = a.full_tensor() if isinstance(a, DTensor) else a
        norms.append((float((full - b).norm()), float(b.norm())))
    apart, size = (math.hypot(*values) for values in zip(*norms, strict=True))
    return apart / size, max(a / b for a, b in norms)


def distance(model: nn.Module, single: nn.Module) -> float:
    """The largest relative difference of a parameter."""
    return distances(model, single)[1]


LR = 1e-3  # for both


def adamw(model: nn.Module) -> torch.optim.AdamW:
    """Fused, in groups of one mesh each, which is all that it takes."""
    groups: dict[Any, list[nn.Parameter]] = {}
    for p in model.parameters():
        groups.setdefault(p.device_mesh if isinstance(p, DTensor) else None, []).append(p)
    return torch.optim.AdamW([{"params": params} for params in groups.values()], LR, fused=True)


def adafactor(model: nn.Module) -> Adafactor:
    return Adafactor(model.parameters(), LR)


def trained(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, rows: slice) -> nn.Module:
    for step in range(steps):
        optimizer.zero_grad()
        backward(model, step, rows)
        optimizer.step()
    return model


def train(rank: int, world: int, kinds: Sequence[str] = KINDS, steps: int = 50, layers: int = 1) -> dict[str, Any]:
    """Forward, backward and step under every kind of sharding: the distance from one process, beside fused AdamW's."""
    found: dict[str, Any] = {}
    for name, make in (("ours", adafactor), ("adamw", adamw)):
        single = Model(layers)
        trained(single, make(single), steps, slice(None))
        for kind in kinds:
            model = sharded(kind, world, layers)
            trained(model, make(model), steps, share_of_batch(kind, rank, world))
            found[f"{kind}: {name}"] = distances(model, single)
    return found


def collectives(rank: int, world: int, kinds: Sequence[str]) -> dict[str, dict[str, Any]]:
    """What one optimizer step sends."""
    by_kind: dict[str, dict[str, Any]] = {"experts": experts(world)}
    for kind in kinds:
        model = sharded(kind, world)
        by_kind[kind] = sent(model, adafactor(model))
    return by_kind


def buffers_of(step: Callable[[], Any]) -> list[int]:
    """The bytes of every all-reduce."""
    buffers: list[int] = []
    all_reduce = dist.all_reduce

    def counting(tensor: torch.Tensor, *arguments: Any, **more: Any) -> Any:
        buffers.append(tensor.numel() * tensor.element_size())
        return all_reduce(tensor, *arguments, **more)

    dist.all_reduce = counting
    try:
        step()
    finally:
        dist.all_reduce = all_reduce
    return buffers


def experts(world: int) -> dict[str, Any]:
    """Experts that lie on different ranks: what a step sends, and the shape of their statistics here."""
    mesh = init_device_mesh("cpu", (world,))
    params = [nn.Parameter(distribute_tensor(torch.ones(2 * world, 5, 7), mesh, [Shard(0)])) for _ in range(3)]
    for p in params:
        p.grad = distribute_tensor(torch.ones(p.shape), mesh, [Shard(0)])
    optimizer = Adafactor(params, factoring=lambda name, shape: Factored(rows=(1,), columns=(2,), batch=(0,)))
    optimizer.step()
    state = optimizer.state[params[0]]
    shapes = {name: tuple(state[name].to_local().shape) for name in ("row", "column")}
    return {"bytes": buffers_of(optimizer.step), **shapes}


def sent(model: nn.Module, optimizer: Adafactor) -> dict[str, Any]:
    """Collectives and bytes of a step that is not the first, and what the formula says."""
    backward(model, 0, slice(0, 2))
    optimizer.step()
    with CommDebugMode() as counted:
        buffers = buffers_of(optimizer.step)
    placements = [placement_of(p, layout(p.shape)) for p in model.parameters() if isinstance(p, DTensor)]
    along: dict[tuple[int, ...], set[int]] = {}
    for place in placements:
        along.setdefault(place.mesh, set()).update(place.dims)
    rounds = []
    for place in placements:
        copies = 2 if len(along) > 1 and len(place.mesh) == 1 else 1  # a sum for each half of the tensor parallel ranks
        first, second = place.sums(True) if place.dims else (0, 0)
        rounds.append(((first - 2) * copies + 2, second))
    columns = 0
    for place in placements:
        if place.cut == "rows":
            shape = place.layout.column_shape
            columns += torch.Size(shape).numel()
    return {
        "collectives": counted.get_total_counts(),
        "bytes": buffers,
        "formula": [4 * sum(r[k] for r in rounds) for k in (0, 1) if sum(r[k] for r in rounds)],
        "columns": columns,
    }
