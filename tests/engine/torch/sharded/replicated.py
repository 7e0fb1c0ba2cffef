"""What the ranks of test_replicated.py run: gradient release beside DDP's ordinary step, on batches of their own."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from adafactor.torch import Adafactor, step_in_backward


class Model(nn.Module):
    """A tied embedding, so that the first parameter comes last; a layer that only one rank or none uses."""

    def __init__(self, unused: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words = nn.Embedding(40, 32)
        self.layers = nn.ModuleList([nn.Linear(32, 32) for _ in range(6)])
        self.big = nn.ModuleList([nn.Linear(32, 9000, bias=False) for _ in range(3)])  # each above 1 MiB
        self.norm = nn.BatchNorm1d(32)
        self.sometimes, self.unused = nn.Linear(32, 32), unused

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.words(tokens).mean(1))
        for layer in self.layers:
            x = x + layer(x).tanh()
        if self.unused == "no" or (self.unused == "on one rank" and dist.get_rank() == 0):
            x = x + self.sometimes(x)
        return (x @ self.words.weight.T).square().mean() + sum(big(x).square().mean() for big in self.big)


def batch(step: int, rank: int) -> torch.Tensor:
    return torch.randint(40, (4, 8), generator=torch.Generator().manual_seed(10 * step + rank))


def train(rank: int, world: int) -> dict[str, Any]:
    """Per case: the largest relative difference from DDP, whether replicas agree, the most bytes of gradients."""
    results: dict[str, Any] = {}
    cases: dict[str, dict[str, Any]] = {
        "DDP": {},
        "gradient_as_bucket_view": {},
        "group": {},
        "bfloat16": {},
        "unused": {},
        "on one rank": {},
        "no_sync": {},
        "accumulation_steps": {"accumulation_steps": 2},
        "max_norm": {"max_norm": 0.01},
        "max_norm, no_sync": {"max_norm": 0.01},
        "framework": {"loop": "framework"},
        "framework, held": {"loop": "framework", "accumulation_steps": 9},
    }
    for case, options in cases.items():
        micro = 2 if "no_sync" in case or "accumulation" in case else 1
        unused = {"unused": "everywhere", "on one rank": "on one rank"}.get(case, "no")
        runs = []
        for release in (False, True):
            inner = Model(unused)
            if case == "bfloat16":
                inner.bfloat16()
            model: Any = inner
            if case == "group" and release and rank:
                with torch.no_grad():
                    inner.big[0].weight.add_(1.0)  # whoever starts from other weights gets the first rank's
            if case != "group" or not release:
                view = case == "gradient_as_bucket_view"
                unused_too = unused != "no" and not release
                model = DistributedDataParallel(inner, find_unused_parameters=unused_too, gradient_as_bucket_view=view)
            rounding = {"stochastic_rounding": case == "bfloat16", "seed": 1}
            optimizer = Adafactor(inner.named_parameters(), lr=1e-2, **rounding)
            released, most = None, [0]
            if release:
                if case == "group":
                    options = {"process_group": dist.group.WORLD}
                released = step_in_backward(model, optimizer, **options)
                for param in inner.parameters():
                    param.register_hook(
                        lambda grad, inner=inner, most=most: most.append(
                            grad.nbytes + sum(p.grad.nbytes for p in inner.parameters() if p.grad is not None)
                        )
                    )
            for step in range(4):
                for k in range(micro):
                    last = k == micro - 1
                    quiet = model.no_sync() if "no_sync" in case and not last else nullcontext()
                    with quiet:
                        loss = model(batch(step * micro + k, rank)) / micro
                        if released is not None and "max_norm" in options:
                            released.backward(loss)
                        else:
                            loss.backward()
                if released is None:
                    if "max_norm" in options:
                        nn.utils.clip_grad_norm_(inner.parameters(), 0.01)
                    optimizer.step()
                    optimizer.zero_grad()
                elif case.startswith("framework"):
                    optimizer.step()
                    optimizer.zero_grad()
            runs.append((inner, optimizer))
        (a, _), (b, optimizer) = runs
        difference = max(
            ((q - p).float().norm() / p.float().norm().clamp(min=1e-3)).item()
            for p, q in zip(
                *(m.parameters() if case == "group" else m.state_dict().values() for m in (a, b)), strict=True
            )
            if p.is_floating_point()
        )
        mine = torch.cat([p.detach().float().flatten() for p in b.parameters()])
        everyone = [torch.empty_like(mine) for _ in range(world)]
        dist.all_gather(everyone, mine)
        results[case] = {
            "difference": difference,
            "identical": all(torch.equal(mine, other) for other in everyone),
            "left": [name for name, p in b.named_parameters() if p.grad is not None],
            "peak": max(most),
            "all": sum(p.nbytes for p in b.parameters()),
            "state": len(optimizer.state),
            "updates": sorted({int(state["step"]) for state in optimizer.state.values()}),
        }
    return results


def refusals(rank: int, world: int) -> dict[str, str]:
    """Models that are not the same, a group beside DDP, a reentrant checkpoint."""
    from torch.utils.checkpoint import checkpoint

    told = {}
    layers = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4 + rank))
    same = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    wrapped = DistributedDataParallel(nn.Linear(4, 4))
    for case, model in (("shapes", layers), ("both", wrapped)):
        try:
            step_in_backward(model, Adafactor(model.parameters()), process_group=dist.group.WORLD)
            told[case] = "no error"
        except (RuntimeError, ValueError) as error:
            told[case] = f"{error}"
    before = [p.detach().clone() for p in same.parameters()]
    optimizer = Adafactor(same.parameters())
    with step_in_backward(same, optimizer, process_group=dist.group.WORLD):
        try:
            checkpoint(same, torch.ones(1, 4, requires_grad=True), use_reentrant=True).sum().backward()
            told["checkpoint"] = "no error"
        except RuntimeError as error:
            written = optimizer.state or not all(map(torch.equal, before, same.parameters()))
            told["checkpoint"] = "something was written" if written and rank == 0 else f"{error}"
    return told


def removed(rank: int, world: int) -> dict[str, Any]:
    """DDP before and after a time of release, beside one that was never without its buckets."""
    runs = []
    for release in (False, True):
        inner = Model("no")
        model = DistributedDataParallel(inner)
        optimizer = Adafactor(inner.parameters(), lr=1e-2)
        reducers = []
        for step in range(6):
            if step == 2 and release:
                released = step_in_backward(model, optimizer)
            if step == 4 and release:
                released.remove()
            reducers.append(type(model.reducer).__name__)
            model(batch(step, rank)).backward()
            if not release or step not in (2, 3):
                optimizer.step()
                optimizer.zero_grad()
        runs.append(list(inner.state_dict().values()))
    with step_in_backward(model, optimizer):
        try:
            with model.join():
                model(batch(0, rank)).backward()
            refused = "no error"
        except RuntimeError as error:
            refused = f"{error}"
    return {"same": all(map(torch.equal, *runs)), "reducers": reducers, "join": refused}


def everything(rank: int, world: int) -> dict[str, Any]:
    return {"train": train(rank, world), "removed": removed(rank, world), "refusals": refusals(rank, world)}
