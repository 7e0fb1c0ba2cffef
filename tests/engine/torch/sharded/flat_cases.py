"""Random tensors, flattened, concatenated and cut at random, beside the same tensors whole.

``python tests/engine/torch/sharded/flat_cases.py 1000`` prints the worst difference of so many cases.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from random import Random
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[3] / "helpers"))
import simulated
import torch
from torch import Tensor

from adafactor import layout
from adafactor.core.intervals import FlatPlacement, cuts
from adafactor.engine.torch.sharded.flat import Span, Spans
from adafactor.engine.torch.sharded.origins import record
from adafactor.torch import Adafactor, Factored

Shape = tuple[int, ...]


def experts(name: str, shape: Shape) -> Factored | None:
    """The first of three axes and more is a batch."""
    if len(shape) > 2:
        return Factored(rows=(-2,), columns=(-1,), batch=(0,))
    return Factored(rows=(0,), columns=(1,)) if len(shape) == 2 else None


def turned(name: str, shape: Shape) -> Factored | None:
    """The contiguous axis as rows."""
    return Factored(rows=(-1,), columns=(-2,)) if len(shape) > 1 else None


def woven(name: str, shape: Shape) -> Factored | None:
    """Rows and columns that alternate, which no kernel takes."""
    return Factored(rows=(0, 2), columns=(1, 3)) if len(shape) == 4 else turned(name, shape)


def batched(name: str, shape: Shape) -> Factored | None:
    """Unfactored slices."""
    return Factored(batch=(0,)) if len(shape) > 1 else None


FACTORING = ["last_two", "largest_two", "smallest", experts, turned, woven, batched]
SETTINGS: list[dict[str, Any]] = [
    {},
    {"fused": False},
    {"beta1": 0.9, "weight_decay": 0.1},
    {"scale_parameter": False, "d": 0.5, "maximize": True},
    {"d": None, "relative_step": False},
]


@dataclass
class Case:
    """Tensors of some shapes, and what every rank holds of their concatenation."""

    shapes: list[Shape]
    pieces: list[tuple[int, int]]
    arguments: dict[str, Any]
    dtype: torch.dtype
    apart: bool  # every tensor's interval is a parameter of its own
    later: dict[str, Any] = field(default_factory=dict)  # what the group says in the last step

    @property
    def layouts(self) -> list[Any]:
        return [layout(shape, self.arguments.get("factoring", "last_two")) for shape in self.shapes]

    @property
    def intervals(self) -> list[tuple[tuple[int, int], ...]]:
        at, cut = 0, []
        for shape in self.shapes:
            cut.append(cuts(at, prod(shape), self.pieces))
            at += prod(shape)
        return cut


def drawn(random: Random) -> Case:
    shapes = [tuple(random.randint(1, 6) for _ in range(random.randint(0, 5))) for _ in range(random.randint(1, 4))]
    if random.random() < 0.3:
        shapes[0] = (random.randint(1, 40), random.randint(1, 60))
    size, world = sum(map(prod, shapes)), random.randint(1, 7)
    ends = sorted(random.randint(0, size) for _ in range(world - 1))
    pieces = list(zip([0, *ends], [*ends, size], strict=True))
    arguments = {"lr": 0.5, "factoring": random.choice(FACTORING), **random.choice(SETTINGS)}
    dtype = random.choice([torch.float32, torch.float32, torch.float64])
    return Case(shapes, pieces, arguments, dtype, random.random() < 0.5)


Grads = list[Tensor | None]


def whole(case: Case, values: list[Tensor], grads: list[Grads]) -> list[Tensor]:
    """The parameters after steps on one process."""
    params = [torch.nn.Parameter(value.clone()) for value in values]
    optimizer = Adafactor([(f"tensor {k}", param) for k, param in enumerate(params)], **case.arguments)
    for number, step in enumerate(grads):
        for param, grad in zip(params, step, strict=True):
            param.grad = None if grad is None else grad.clone()
        optimizer.param_groups[0] |= case.later if number == len(grads) - 1 else {}
        optimizer.step()
    return [param.detach() for param in params]


def flat(case: Case, group: Any, values: list[Tensor], grads: list[Grads]) -> dict[str, Any]:
    """The same on one rank, of its interval of every tensor. Where ``apart``, a gradient of zeros is none."""
    rank, at = group.rank(), 0
    spans = []
    for k, (shape, intervals) in enumerate(zip(case.shapes, case.intervals, strict=True)):
        spans.append(Span(f"tensor {k}", shape, intervals, 0 if case.apart else max(0, at - case.pieces[rank][0])))
        at += prod(shape)

    def cut(tensors: list[Tensor]) -> list[Tensor]:
        pieces = [t.reshape(-1)[slice(*its[rank])] for t, its in zip(tensors, case.intervals, strict=True)]
        return [piece.clone() for piece in pieces] if case.apart else [torch.cat(pieces)]

    params = [torch.nn.Parameter(value) for value in cut(values)]
    for k, param in enumerate(params):
        record(param, Spans((spans[k],) if case.apart else tuple(spans), group))
    optimizer = Adafactor([(f"tensor {k}", param) for k, param in enumerate(params)], **case.arguments)
    for number, step in enumerate(grads):
        optimizer.param_groups[0] |= case.later if number == len(grads) - 1 else {}
        there = [torch.zeros_like(v) if g is None else g for g, v in zip(step, values, strict=True)]
        for param, grad in zip(params, cut(there), strict=True):
            param.grad = None if case.apart and not bool(grad.any()) else grad
        optimizer.step()
    held = [tensor for its in optimizer.state.values() for slot, tensor in its.items() if slot in ("row", "column")]
    state = sum(tensor.nbytes for tensor in held)
    return {"values": torch.cat([param.detach() for param in params]), "reduced": group.reduced, "state": state}


def formula(case: Case) -> list[int]:
    """Bytes of the all-reduces of one step, as docs/sharding.md has them."""
    if len(case.pieces) == 1:
        return []
    scaled = case.arguments.get("scale_parameter", True)
    each = [FlatPlacement(its, cut, 0).sums(scaled) for its, cut in zip(case.layouts, case.intervals, strict=True)]
    width = 8 if case.dtype == torch.float64 else 4
    return [width * numbers for numbers in map(sum, zip(*each, strict=True)) if numbers]


def joined(case: Case, held: list[Tensor]) -> list[Tensor]:
    """The whole tensors from what the ranks hold."""
    parts: list[list[Tensor]] = [[] for _ in case.shapes]
    for rank, values in enumerate(held):
        for room, piece in zip(
            parts, values.split([its[rank][1] - its[rank][0] for its in case.intervals]), strict=True
        ):
            room.append(piece)
    return [torch.cat(pieces).view(shape) for pieces, shape in zip(parts, case.shapes, strict=True)]


def compared(case: Case, seed: int, steps: int = 3, faults: bool = True) -> dict[str, Any]:
    """The worst difference of any tensor, relative to its largest element, and the bytes sent.

    Args:
        faults: some gradients are missing on some ranks or on all, and one holds a NaN or an infinity.
    """
    generator, random = torch.Generator().manual_seed(seed), Random(seed)

    def draw(scale: float) -> list[Tensor]:
        wide = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in case.shapes]
        return [tensor.to(case.dtype) * scale for tensor in wide]

    values, drawn = draw(0.3), [draw(10.0 ** (k - 3)) for k in range(steps)]
    grads: list[Grads] = [list(step) for step in drawn]
    if faults:
        bad = drawn[2][0].view(-1)
        bad[random.randrange(len(bad))] = random.choice([torch.nan, torch.inf])
    if faults and case.apart:
        grads[1][0] = None
        for rank, (begin, end) in enumerate(case.intervals[-1]):
            if rank % 2:
                drawn[0][-1].view(-1)[begin:end] = 0
        if not bool(drawn[0][-1].any()):
            grads[0][-1] = None
    by_rank = simulated.run(len(case.pieces), lambda group: flat(case, group, values, grads))
    worst = 0.0
    for a, b in zip(joined(case, [its["values"] for its in by_rank]), whole(case, values, grads), strict=True):
        assert bool(a.isfinite().all())
        worst = max(worst, float((a - b).abs().max() / b.abs().max()))
    return {"worst": worst, "reduced": [its["reduced"] for its in by_rank], "steps": steps}


def cases(count: int, first: int = 0) -> Iterator[tuple[int, Case]]:
    for seed in range(first, first + count):
        yield seed, drawn(Random(seed))


def main(count: int) -> None:
    worst = {torch.float32: 0.0, torch.float64: 0.0}
    collectives: dict[int, int] = {}
    for seed, case in cases(count):
        result = compared(case, seed)
        worst[case.dtype] = max(worst[case.dtype], result["worst"])
        expected = formula(case)
        assert result["reduced"] == [expected * result["steps"]] * len(case.pieces), (seed, case)
        collectives[len(expected)] = collectives.get(len(expected), 0) + 1
    single, double = worst[torch.float32], worst[torch.float64]
    print(f"{count} cases, worst relative difference {single:.1e} in float32, {double:.1e} in float64")
    print(f"cases by all-reduces of a step: {dict(sorted(collectives.items()))}; bytes as the formula says in all")
    shape = (4096, 4096)
    for world in (2, 3, 7):
        ends = [prod(shape) * rank // world + 5 * rank for rank in range(1, world)]
        case = Case([shape], list(zip([0, *ends], [*ends, prod(shape)], strict=True)), {}, torch.float32, True)
        ones = torch.ones(shape)
        held = simulated.run(world, lambda group, case=case, ones=ones: flat(case, group, [ones], [[ones]]))
        state = sum(its["state"] for its in held) / prod(shape)
        numbers = " and ".join(str(width // 4) for width in formula(case))
        print(f"4096 x 4096 on {world} ranks: {state:.4f} bytes of state per parameter, sends {numbers} numbers")


if __name__ == "__main__":
    main(int(sys.argv[1]))
