"""What the ranks of test_layouts.py run: sharded parameters beside whole ones, with the same gradients."""

from __future__ import annotations

from itertools import product
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import Placement, _StridedShard

from adafactor.engine.torch.cpu import Native
from adafactor.engine.torch.work import local_of
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
    made: dict[str, tuple[DeviceMesh, list[Placement]]] = {
        "Shard(0)": (line, [S0]),
        "Shard(1)": (line, [S1]),
        "Replicate": (line, [R]),
    }
    if world == 4:
        grid = init_device_mesh("cpu", (2, 2), mesh_dim_names=("left", "right"))
        made |= {
            "HSDP": (grid, [R, S0]),
            "FSDP x TP rowwise": (grid, [S0, S1]),
            "Shard(1) x Shard(0)": (grid, [S1, S0]),
            "FSDP x TP colwise": (grid, [_StridedShard(0, split_factor=2), S0]),
            "FSDP x replicated": (grid, [S0, R]),
            "Shard(0) x Shard(0)": (grid, [S0, S0]),
        }
    return made


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
    from adafactor.core.factoring import Layout
    from adafactor.engine.torch.sharded.dtensor import placement_of

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
    differences: dict[str, float] = {}
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
            differences[f"{layout}, {variant}"] = worst
    return differences


def ragged(rank: int, world: int) -> dict[str, Any]:
    """Gradients that are missing or not finite on some ranks only."""
    mesh = init_device_mesh("cpu", (world,))
    results: dict[str, Any] = {}
    cases = {"rows and experts": (S0, experts), "columns": (S1, "last_two"), "a stack": (S0, "last_two")}
    for (case, (split, factoring)), fused in product(cases.items(), (None, False)):
        torch.manual_seed(0)
        values = [torch.randn(6, 4), torch.randn(4, 6), torch.randn(5, 5), torch.randn(4, 3, 2)]
        if split == S0:
            values[2] = torch.randn(5)
        singles = [torch.nn.Parameter(x.clone()) for x in values]
        shards = [torch.nn.Parameter(distribute_tensor(x.clone(), mesh, [split])) for x in values]
        arguments: dict[str, Any] = {"factoring": factoring, "fused": fused}
        one, many = Adafactor(singles, **arguments), Adafactor(shards, **arguments)
        for step in range(4):
            grads = [torch.randn(x.shape) for x in values]
            if step == 1:  # only rank 0 has a gradient of the first; nobody has one of the second
                for other in grads[0].chunk(world, split.dim)[1:]:
                    other.zero_()
            if step == 2:  # one element of the last rank's vector, and of its experts
                for k, bad in ((2, float("nan")), (3, float("inf"))):
                    grads[k][(-1,) * grads[k].dim()] = bad
            for k, (a, b, g) in enumerate(zip(singles, shards, grads, strict=True)):
                a.grad, b.grad = g.clone(), share(g, b)
                if step == 1 and k == 1:
                    a.grad = b.grad = None
                if step == 1 and k == 0 and rank:
                    b.grad = None
            one.step()
            many.step()
        results[f"{case}, {fused}"] = {
            "steps": [int(many.state[p]["step"]) for p in shards],
            "skipped": (one.skipped, many.skipped),
            "distance": max(distance(b, a) for a, b in zip(singles, shards, strict=True)),
        }
    return results


def overflowing(rank: int, world: int) -> tuple[int, int]:
    """Updates made and left alone of experts of which one's squares overflow as soon as two ranks' are added up."""
    grid = init_device_mesh("cpu", (2, 2))
    param = torch.nn.Parameter(distribute_tensor(torch.ones(4, 2, 3), grid, [S0, S1]))
    optimizer = Adafactor([param], factoring=experts)
    for largest in (1.5e19, 1.0):  # its square is finite, twice that is not
        grad = torch.ones(4, 2, 3)
        grad[0, :, 0] = largest
        param.grad = share(grad, param)
        optimizer.step()
    return int(optimizer.state[param]["step"]), optimizer.skipped


def changed(rank: int, world: int) -> float:
    """``scale_parameter`` and ``skip_nonfinite`` go off and on between steps."""
    mesh = init_device_mesh("cpu", (world,))
    torch.manual_seed(0)
    single = torch.nn.Parameter(torch.randn(6, 4))
    many = torch.nn.Parameter(distribute_tensor(single.detach().clone(), mesh, [S0]))
    one, other = Adafactor([single], lr=0.1), Adafactor([many], lr=0.1)
    for step in range(4):
        grad = torch.randn(6, 4)
        for optimizer, param, its in ((one, single, grad), (other, many, share(grad, many))):
            optimizer.param_groups[0] |= {"scale_parameter": step % 2 == 0, "skip_nonfinite": step < 3}
            param.grad = its
            optimizer.step()
    return distance(many, single)


def left_alone(rank: int, world: int) -> bool:
    """Shards of one element, whose absent gradient is as dense as any, stay what they are."""
    mesh = init_device_mesh("cpu", (world,))
    others, lone = (torch.nn.Parameter(distribute_tensor(torch.ones(n), mesh, [S0])) for n in (4 * world, world))
    optimizer = Adafactor([others, lone], weight_decay=0.5, lr=0.1)
    others.grad = share(torch.ones(4 * world), others)
    optimizer.step()
    return bool((lone.to_local() == 1).all()) and lone not in optimizer.state


def left_alone_later(rank: int, world: int, fused: bool | None = None) -> bool:
    """The same after an update: weights, state, what autograd counts, and that update's diagnostics."""
    mesh = init_device_mesh("cpu", (world,))
    others, lone = (torch.nn.Parameter(distribute_tensor(torch.ones(n), mesh, [S0])) for n in (4 * world, world))
    optimizer = Adafactor([others, lone], weight_decay=0.5, lr=0.1, beta1=0.9, diagnostics=True, fused=fused)

    def seen() -> list[Any]:
        kept = [local_of(value).clone() for value in optimizer.state[lone].values()]
        version = lone.to_local()._version
        return [lone.to_local().tolist(), version, *kept, *optimizer.diagnostics()["1"].values()]

    others.grad, lone.grad = share(torch.ones(4 * world), others), share(torch.ones(world), lone)
    optimizer.step()
    before, lone.grad = seen(), None
    for _ in range(2):
        optimizer.step()
    return seen() == before and optimizer.skipped == 0 and int(optimizer.state[others]["step"]) == 3


def afresh(rank: int, world: int) -> list[int]:
    """Updates counted after the state of one parameter, and of all, was deleted."""
    mesh = init_device_mesh("cpu", (world,))
    params = [torch.nn.Parameter(distribute_tensor(torch.ones(2 * world, 3), mesh, [S0])) for _ in range(2)]
    optimizer = Adafactor(params)
    counts = []
    for forget in (lambda: None, lambda: None, lambda: optimizer.state.pop(params[0]), optimizer.state.clear):
        forget()
        for param in params:
            param.grad = share(torch.ones(2 * world, 3), param)
        optimizer.step()
        counts += [int(optimizer.state[param]["step"]) for param in params]
    return counts


def groups_and_kernels(rank: int, world: int) -> dict[str, Any]:
    return {"groups": groups(rank, world), "kernels": kernels()}


def groups(rank: int, world: int) -> dict[str, float]:
    """One model over several meshes, some of them with other parameters on other ranks, in every dtype at once."""
    line = init_device_mesh("cpu", (world,))
    grid = init_device_mesh("cpu", (2, 2), mesh_dim_names=("left", "right"))
    stages = [DeviceMesh("cpu", [0, 1]), DeviceMesh("cpu", [2, 3])]
    alone = [DeviceMesh("cpu", [k]) for k in range(world)]
    places = {
        "line": (line, S0), "left": (grid["left"], S1), "right": (grid["right"], S0), "stage": (stages[rank // 2], S1),
        "alone": (alone[rank], S0),
    }  # fmt: skip
    dtypes = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
    pairs, names = [], []
    for k, (name, (mesh, split)) in enumerate(places.items()):
        for dtype in dtypes:
            seed = {"stage": rank // 2, "alone": rank}.get(name, 0)  # these are not the same on all ranks
            x = torch.randn(9 + k, 7, generator=torch.Generator().manual_seed(seed)).to(dtype)
            shard = torch.nn.Parameter(distribute_tensor(x.clone(), mesh, [split], src_data_rank=None))
            pairs.append((torch.nn.Parameter(x), shard))
            names.append(f"{name}, {dtype}")
    one, many = (Adafactor([pair[k] for pair in pairs], lr=0.05) for k in (0, 1))
    for step in range(5):
        for k, (a, b) in enumerate(pairs):
            a.grad = torch.randn(a.shape, generator=torch.Generator().manual_seed(step * 100 + k)).to(a.dtype)
            b.grad = share(a.grad, b)
        one.step()
        many.step()
    return {name: distance(b, a) for name, (a, b) in zip(names, pairs, strict=True)}


def kernels() -> dict[str, bool]:
    """Which layouts the native kernels step."""
    mesh = init_device_mesh("cpu", (2, 2))
    cases: dict[str, tuple[tuple[int, ...], list[Placement]]] = {
        "rows": ((8, 6), [S0, R]),
        "columns": ((8, 6), [R, S1]),
        "a stack": ((4, 3, 5), [S0, S0]),
        "columns of a stack": ((3, 4, 8), [R, Shard(2)]),
        "a vector": ((9,), [S0, S0]),
        "rows and columns": ((8, 6), [S0, S1]),
    }
    reached = {}
    for name, (shape, placements) in cases.items():
        param = torch.nn.Parameter(distribute_tensor(torch.ones(shape), mesh, placements))
        param.grad = distribute_tensor(torch.ones(shape), mesh, placements)
        optimizer = Adafactor([param])
        optimizer.step()
        (prepared,) = optimizer._preparation._prepared.values()
        optimizer.step()
        assert list(optimizer._preparation._prepared.values()) == [prepared], "nothing moved, and all was made anew"
        reached[name] = [type(backend) for backend, _ in prepared.sharded.plan.backends] == [Native]
    return reached


def rounding(rank: int, world: int) -> dict[str, float]:
    """bfloat16 weights with stochastic rounding: the share that is not the same as a single process's."""
    shares = {}
    for layout, (mesh, placements) in meshes(world).items():
        for fused in (None, False):
            different = total = 0
            torch.manual_seed(0)
            for shape in [(64, 48), (8, 16, 12), (33, 16), (64,), (24, world)]:
                x = torch.randn(shape).bfloat16()
                mine = shard(x.clone(), mesh, placements)
                if mine is None:
                    continue
                a, b = torch.nn.Parameter(x), torch.nn.Parameter(mine)
                arguments: dict[str, Any] = {"lr": 1e-3, "stochastic_rounding": True, "seed": 7, "fused": fused}
                one, many = Adafactor([a], **arguments), Adafactor([b], **arguments)
                for _ in range(5):
                    a.grad = torch.randn(shape).bfloat16()
                    b.grad = share(a.grad, b)
                    one.step()
                    many.step()
                ours, theirs = b.detach().to_local(), whole(a.detach(), b)
                different += int((ours != theirs).sum())
                total += ours.numel()
            shares[f"{layout}, {fused}"] = different / max(1, total)
    return shares


def compensated(rank: int, world: int) -> dict[str, float]:
    """Compensated bfloat16 against the single process: the distance of parameter and residual together."""
    distances = {}
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
                distances[f"{layout}, {fused}, {shape}"] = float((ours - theirs).norm() / max(theirs.norm(), 1e-30))
    return distances
