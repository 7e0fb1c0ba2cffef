"""A Transformer of a few thousand weights under every kind of sharding, and what its steps send."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from adafactor.factoring import layout
from adafactor.sharding.dtensor import placement_of
from adafactor.sharding.placement import sums
from adafactor.torch import Adafactor

WIDTH, WORDS = 16, 24


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(3 * WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.tanh(self.up(self.norm(x))))


class Model(nn.Module):
    def __init__(self, layers: int = 12) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words = nn.Embedding(WORDS, WIDTH)
        self.blocks = nn.Sequential(*[Block() for _ in range(layers)])
        self.head = nn.Linear(WIDTH, WORDS)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.blocks(self.words(tokens)))


def sharded(kind: str, world: int, layers: int = 12) -> Model:
    model = Model(layers)
    if kind == "FSDP2":
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
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
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


def distance(model: nn.Module, single: nn.Module) -> float:
    moved = size = torch.zeros(())
    for a, b in zip(model.parameters(), single.parameters(), strict=True):
        full = a.full_tensor() if isinstance(a, DTensor) else a
        moved = moved + (full - b).detach().square().sum()
        size = size + b.detach().square().sum()
    return float((moved / size).sqrt())


def adamw(model: nn.Module, lr: float) -> torch.optim.AdamW:
    """Fused, in groups of one mesh each, which is all that it takes."""
    groups: dict[Any, list[nn.Parameter]] = {}
    for p in model.parameters():
        groups.setdefault(p.device_mesh if isinstance(p, DTensor) else None, []).append(p)
    return torch.optim.AdamW([{"params": params} for params in groups.values()], lr, fused=True)


def adafactor(model: nn.Module, lr: float = 1e-3) -> Adafactor:
    return Adafactor(model.parameters(), lr)


def train(rank: int, world: int, kinds: list[str], steps: int = 50) -> dict[str, Any]:
    """End to end, beside fused AdamW; collectives and bytes of one optimizer step."""
    found: dict[str, Any] = {}
    for kind in kinds:
        for name, make in (("ours", adafactor), ("adamw", adamw)):
            torch.manual_seed(0)
            single, model = Model(), sharded(kind, world)
            one, many = make(single, lr=1e-3), make(model, lr=1e-3)
            for step in range(steps):
                for m, optimizer, rows in (
                    (single, one, slice(None)),
                    (model, many, share_of_batch(kind, rank, world)),
                ):
                    optimizer.zero_grad()
                    backward(m, step, rows)
                    optimizer.step()
            found[f"{kind}: {name}"] = distance(model, single)
        found[f"{kind}: sent"] = sent(model, adafactor(model))
    return found


def sent(model: nn.Module, optimizer: Adafactor) -> dict[str, Any]:
    """Collectives and bytes of a step that is not the first, and what the formula says."""
    backward(model, 0, slice(0, 2))
    optimizer.step()
    buffers: list[int] = []
    all_reduce = dist.all_reduce

    def counting(tensor: torch.Tensor, *arguments: Any, **more: Any) -> Any:
        buffers.append(tensor.numel() * tensor.element_size())
        return all_reduce(tensor, *arguments, **more)

    dist.all_reduce = counting
    try:
        with CommDebugMode() as counted:
            optimizer.step()
    finally:
        dist.all_reduce = all_reduce
    placements = [placement_of(p, layout(p.shape)) for p in model.parameters() if isinstance(p, DTensor)]
    along: dict[tuple[int, ...], set[int]] = {}
    for place in placements:
        along.setdefault(place.mesh, set()).update(place.dims)
    rounds = []
    for place in placements:
        copies = 2 if len(along) > 1 and len(place.mesh) == 1 else 1  # a sum for each half of the tensor parallel ranks
        first, second = sums(place, tuple(sorted(along[place.mesh])), True)
        rounds.append(((first - 2) * copies + 2, second))
    columns = 0
    for place in placements:
        if place.mode == "rows":
            shape = place.roles.row_shape if place.turned else place.roles.column_shape
            columns += torch.Size(shape).numel()
    return {
        "collectives": counted.get_total_counts(),
        "bytes": buffers,
        "formula": [4 * sum(r[k] for r in rounds) for k in (0, 1) if sum(r[k] for r in rounds)],
        "columns": columns,
    }
