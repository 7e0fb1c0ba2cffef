"""What the ranks of test_layouts.py run: sharded parameters beside whole ones, with the same gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import Placement, _StridedShard

from adafactor.torch import Adafactor, Factored

SHAPES = [(48, 40), (7, 5), (1, 6), (6, 1), (3, 4, 5), (8, 4, 6), (6, 4, 3, 3), (9,), (2,)]
S0, S1, R = Shard(0), Shard(1), Replicate()


def experts(name: str, shape: tuple[int, ...]) -> Factored | None:
    """The first of three axes is a batch; everything else as usual."""
    if len(shape) == 3:
        return Factored(rows=(1,), columns=(2,), batch=(0,))
    return Factored(rows=(-2,), columns=(-1,)) if len(shape) > 1 else None


VARIANTS: dict[str, dict[str, Any]] = {
    "native": {},
    "torch operations": {"fused": False},
    "momentum, decay": {"beta1": 0.9, "weight_decay": 0.1},
    "smallest, d=0.5": {"factoring": "smallest", "d": 0.5},
    "experts": {"factoring": experts, "scale_parameter": False},
}


def meshes(world: int) -> dict[str, tuple[DeviceMesh, list[Placement]]]:
    line = init_device_mesh("cpu", (world,), mesh_dim_names=("line",))
    found: dict[str, tuple[DeviceMesh, list[Placement]]] = {
        "Shard(0)": (line, [S0]),
        "Shard(1)": (line, [S1]),
        "Replicate": (line, [R]),
    }
    if world == 4:
        grid = init_device_mesh("cpu", (2, 2), mesh_dim_names=("left", "right"))
        found |= {
            "HSDP": (grid, [R, S0]),
            "FSDP x TP rowwise": (grid, [S0, S1]),
            "Shard(1) x Shard(0)": (grid, [S1, S0]),
            "FSDP x TP colwise": (grid, [_StridedShard(0, split_factor=2), S0]),
            "FSDP x replicated": (grid, [S0, R]),
            "Shard(0) x Shard(0)": (grid, [S0, S0]),
        }
    return found


def shard(whole: torch.Tensor, mesh: DeviceMesh, placements: list[Placement]) -> DTensor | None:
    """A shard of ``whole``; None where the shape has not enough axes."""
    if any(isinstance(p, Shard) and p.dim >= whole.dim() for p in placements):
        return None
    if not any(isinstance(p, _StridedShard) for p in placements):
        return distribute_tensor(whole, mesh, placements)
    # What fully_shard leaves after a colwise plan: cut along "right" first, and each piece along "left".
    if whole.shape[0] % 4:
        return None
    left, right = mesh.get_coordinate()
    local = whole.chunk(2)[right].chunk(2)[left].clone()
    return DTensor.from_local(local, mesh, placements, shape=whole.shape, stride=whole.stride())


def whole(tensor: torch.Tensor, like: DTensor) -> torch.Tensor:
    """This rank's part of a whole tensor, to compare with."""
    from adafactor.factoring import Layout
    from adafactor.sharding.dtensor import placement_of

    part = placement_of(like, Layout(tuple(like.shape), (), ())).part
    return tensor[tuple(slice(o, o + n) for o, n in zip(part.offset, part.shape, strict=True))]


def share(tensor: torch.Tensor, like: torch.nn.Parameter) -> DTensor:
    """A gradient sharded as its parameter, without asking the other ranks for it."""
    local = whole(tensor, like).contiguous()
    return DTensor.from_local(local, like.device_mesh, like.placements, shape=tensor.shape, stride=tensor.stride())


def distance(ours: DTensor, single: torch.Tensor) -> float:
    difference = (ours.detach().to_local().double() - whole(single.detach(), ours).double()).norm()
    return float(difference / single.detach().double().norm())


def compare(rank: int, world: int, steps: int = 50, dtype: torch.dtype = torch.float32) -> dict[str, float]:
    """The largest difference of a parameter or a statistic from the single process's, per layout and variant."""
    found: dict[str, float] = {}
    for layout, (mesh, placements) in meshes(world).items():
        torch.manual_seed(0)
        pairs: dict[str, list[tuple[torch.nn.Parameter, torch.nn.Parameter]]] = {variant: [] for variant in VARIANTS}
        for variant in VARIANTS:
            for shape in SHAPES:
                x = torch.randn(shape, dtype=dtype)
                if (mine := shard(x.clone(), mesh, placements)) is not None:
                    pairs[variant].append((torch.nn.Parameter(x), torch.nn.Parameter(mine)))
        one, many = (
            Adafactor([{"params": [pair[k] for pair in pairs[v]], **VARIANTS[v]} for v in VARIANTS], lr=0.05)
            for k in (0, 1)
        )
        for _ in range(steps):
            for a, b in (pair for variant in pairs.values() for pair in variant):
                a.grad = torch.randn(a.shape, dtype=dtype) * torch.linspace(0.1, 2, a.shape[-1], dtype=dtype)
                b.grad = share(a.grad, b)
            one.step()
            many.step()
        for variant in VARIANTS:
            worst = 0.0
            for a, b in pairs[variant]:
                worst = max(worst, distance(b, a))
                for name, value in one.state[a].items():
                    other = many.state[b][name]
                    if name == "step":
                        assert other.item() == value.item() == steps
                    else:
                        assert other.shape == value.shape
                        worst = max(worst, distance(other, value) if name != "momentum" else 0.0)
            found[f"{layout}, {variant}"] = worst
    return found


def ragged(rank: int, world: int) -> dict[str, Any]:
    """Gradients that are missing or not finite on some ranks only."""
    mesh = init_device_mesh("cpu", (world,))
    found: dict[str, Any] = {}
    for fused in (None, False):
        torch.manual_seed(0)
        values = [torch.randn(6, 4), torch.randn(4, 6), torch.randn(5), torch.randn(4, 3, 2)]
        singles = [torch.nn.Parameter(x.clone()) for x in values]
        shards = [torch.nn.Parameter(distribute_tensor(x.clone(), mesh, [S0])) for x in values]
        arguments: dict[str, Any] = {"factoring": experts, "fused": fused}
        one, many = Adafactor(singles, **arguments), Adafactor(shards, **arguments)
        for step in range(4):
            grads = [torch.randn(x.shape) for x in values]
            if step == 1:  # only rank 0 has a gradient of the first; nobody has one of the second
                grads[0][whole_rows(grads[0], world) :] = 0
            if step == 2:  # one element of the last rank's experts, and of its vector
                grads[2][-1], grads[3][-1, 0, 0] = float("nan"), float("inf")
            for k, (a, b, g) in enumerate(zip(singles, shards, grads, strict=True)):
                a.grad, b.grad = g.clone(), share(g, b)
                if step == 1 and k == 1:
                    a.grad = b.grad = None
                if step == 1 and k == 0 and rank:
                    b.grad = None
            one.step()
            many.step()
        found[f"steps {fused}"] = [int(many.state[p]["step"]) for p in shards]
        found[f"skipped {fused}"] = (one.skipped, many.skipped)
        found[f"distance {fused}"] = max(distance(b, a) for a, b in zip(singles, shards, strict=True))
    return found


def whole_rows(tensor: torch.Tensor, world: int) -> int:
    return len(tensor.chunk(world)[0])


def rounding(rank: int, world: int) -> dict[str, float]:
    """bfloat16 weights with stochastic rounding: the share that is not the same as a single process's."""
    found = {}
    for layout, (mesh, placements) in meshes(world).items():
        for fused in (None, False):
            different = total = 0
            torch.manual_seed(0)
            for shape in [(64, 48), (8, 16, 12), (33, 16), (64,)]:
                x = torch.randn(shape).bfloat16()
                mine = shard(x.clone(), mesh, placements)
                if mine is None:
                    continue
                a, b = torch.nn.Parameter(x), torch.nn.Parameter(mine)
                arguments: dict[str, Any] = {"lr": 1e-3, "stochastic_rounding": True, "seed": 7, "fused": fused}
                one, many = Adafactor([a], **arguments), Adafactor([b], **arguments)
                for _ in range(10):
                    a.grad = torch.randn(shape).bfloat16()
                    b.grad = share(a.grad, b)
                    one.step()
                    many.step()
                ours, theirs = b.detach().to_local(), whole(a.detach(), b)
                different += int((ours != theirs).sum())
                total += ours.numel()
            found[f"{layout}, {fused}"] = different / max(1, total)
    return found


def compensated(rank: int, world: int) -> dict[str, float]:
    """Compensated bfloat16 against the single process: the distance of parameter and residual together."""
    found = {}
    for layout, (mesh, placements) in meshes(world).items():
        for fused in (None, False):
            torch.manual_seed(0)
            for shape in [(64, 48), (8, 16, 12), (33, 16), (64,)]:
                x = torch.randn(shape).bfloat16()
                mine = shard(x.clone(), mesh, placements)
                if mine is None:
                    continue
                a, b = torch.nn.Parameter(x), torch.nn.Parameter(mine)
                one, many = (Adafactor([p], lr=1e-3, compensated=True, fused=fused) for p in (a, b))
                for _ in range(10):
                    a.grad = torch.randn(shape).bfloat16()
                    b.grad = share(a.grad, b)
                    one.step()
                    many.step()
                residual = many.state[b]["residual"]
                assert (residual.placements, residual.dtype) == (b.placements, torch.bfloat16)
                ours = b.detach().to_local().double() + residual.to_local().double()
                theirs = whole(a.detach().double() + one.state[a]["residual"].double(), b)
                found[f"{layout}, {fused}, {shape}"] = float((ours - theirs).norm() / max(theirs.norm(), 1e-30))
    return found
