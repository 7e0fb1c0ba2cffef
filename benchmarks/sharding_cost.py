"""What a step of the optimizer sends, computed from a model's shapes and a mesh: no device is asked.

    python benchmarks/sharding_cost.py                    # the table of docs/sharding.md
    python benchmarks/sharding_cost.py --model 7B --mesh 8x8 --latency 20 --bandwidth 50

The numbers in a buffer are those that the optimizer packs (`Placement.sums` of `core/placement.py`); tests count the
bytes of real steps against them. Time is a model: a ring all-reduce of B bytes over p ranks moves 2 B (p - 1) / p
bytes through every link, and takes 2 (p - 1) messages one after the other, a tree 2 log2(p).
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from adafactor.core.factoring import layout
from adafactor.core.placement import MeshPlacement, Split

Shape = tuple[int, ...]


class Llama(NamedTuple):
    """The sizes of a Llama model."""

    width: int
    hidden: int
    layers: int
    heads: int
    groups: int  # key and value heads
    words: int


MODELS = {
    "7B": Llama(4096, 11008, 32, 32, 32, 32000),
    "70B": Llama(8192, 28672, 80, 64, 8, 128256),
    "405B": Llama(16384, 53248, 126, 128, 8, 128256),
}
# What tensor parallelism does to a weight of (out, in) features: splits an axis, repeats it on its own mesh, or
# leaves it alone, so that it lives on the mesh of FSDP.
COLWISE, ROWWISE, REPEATED, WHOLE = 0, 1, 2, None


def parameters(model: Llama) -> Iterator[tuple[Shape, int | None]]:
    """Every parameter's shape and the axis that tensor parallelism splits."""
    small = model.width // model.heads * model.groups
    yield (model.words, model.width), COLWISE
    for _ in range(model.layers):
        yield (model.width, model.width), COLWISE  # queries
        yield (small, model.width), COLWISE  # keys
        yield (small, model.width), COLWISE  # values
        yield (model.width, model.width), ROWWISE
        yield (model.hidden, model.width), COLWISE  # gate
        yield (model.hidden, model.width), COLWISE  # up
        yield (model.width, model.hidden), ROWWISE
        yield (model.width,), WHOLE
        yield (model.width,), WHOLE
    yield (model.width,), WHOLE
    yield (model.words, model.width), COLWISE


class Cost(NamedTuple):
    """Of one optimizer step.

    Attributes:
        rounds: all-reduces one after the other.
        sent: bytes in the buffers.
        weights: bytes of float32 weights that a rank holds, to compare.
    """

    rounds: int
    sent: int
    weights: int


def ours(model: Iterable[tuple[Shape, int | None]], shards: int, tensor: int = 1) -> Cost:
    """FSDP2 over ``shards`` ranks, and tensor parallelism over ``tensor`` ranks inside.

    Args:
        model: every parameter's shape, and what tensor parallelism does to it.
    """
    first = second = weights = 0
    mesh = (shards, tensor) if tensor > 1 else (shards,)
    for shape, axis in model:
        splits = [Split(0, tensor if axis == 0 and tensor > 1 else 1)]
        if tensor > 1:
            splits.append(Split(None if axis == REPEATED else axis))
        place = MeshPlacement(layout(shape), mesh, (0,) * len(mesh), tuple(splits))
        copies = (
            tensor if axis is None and tensor > 1 else 1
        )  # lives on the FSDP mesh: one sum per tensor parallel rank
        one, two = place.sums(scaled=True) if place.dims else (0, 0)
        first, second = first + (one - 2) * copies + 2, second + two
        weights += 4 * math.prod(place.part.shape)
    return Cost(1 + bool(second), 4 * (first + second), weights)


def optax(model: Llama) -> tuple[int, int]:
    """All-reduces of optax.adafactor under GSPMD when rows are split: three to six per matrix (docs/sharding.md)."""
    matrices = sum(len(shape) > 1 for shape, _ in parameters(model))
    return 3 * matrices, 6 * matrices


def table(latency: float, bandwidth: float, models: list[str], meshes: list[tuple[int, int]]) -> Iterator[str]:
    """Rows of Markdown. Latency in microseconds per message, bandwidth in GB/s per link."""
    yield (
        "| model | FSDP x TP | all-reduces | MB in them | of the weights held "
        "| latency, ring | latency, tree | bandwidth | AdamW's | optax's |"
    )
    yield "|---|---|---|---|---|---|---|---|---|---|"
    for name in models:
        low, high = optax(MODELS[name])
        for shards, tensor in meshes:
            cost, ranks = ours(parameters(MODELS[name]), shards, tensor), shards * tensor
            ring = cost.rounds * 2 * (ranks - 1) * latency / 1e3
            tree = cost.rounds * 2 * math.ceil(math.log2(ranks)) * latency / 1e3
            moved = 2 * cost.sent * (ranks - 1) / ranks / (bandwidth * 1e6)
            yield (
                f"| {name} | {shards} x {tensor} | {cost.rounds} | {cost.sent / 1e6:.1f} "
                f"| {100 * cost.sent / cost.weights:.1f} % | {ring:.1f} ms | {tree:.2f} ms | {moved:.2f} ms "
                f"| 0 | {low:,} to {high:,} |"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, action="append", help="default: all")
    parser.add_argument("--mesh", action="append", help="FSDPxTP ranks, as 64x8; default: 64 to 4,096 ranks")
    parser.add_argument("--latency", type=float, default=10.0, help="microseconds per message (assumed)")
    parser.add_argument("--bandwidth", type=float, default=50.0, help="GB/s per link (assumed)")
    arguments = parser.parse_args()
    meshes = [(64, 1), (512, 1), (4096, 1), (8, 8), (64, 8), (512, 8)]
    if arguments.mesh:
        meshes = [(int(a), int(b)) for a, b in (mesh.split("x") for mesh in arguments.mesh)]
    print("\n".join(table(arguments.latency, arguments.bandwidth, arguments.model or list(MODELS), meshes)))


if __name__ == "__main__":
    main()
