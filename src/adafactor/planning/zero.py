"""DeepSpeed's ZeRO: partitions of flat float32 buffers, and what each optimizer keeps for one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate

from adafactor.core.intervals import FlatPlacement, Interval, cuts
from adafactor.planning.optimizers import HALF, Adafactor, AdamW8bit, Optimizer, TorchAdamW
from adafactor.planning.parameters import Parameter

STAGES = (1, 2, 3)
#: Stages 1 and 2 pad a buffer to a multiple of so many numbers per rank (``nccl_start_alignment_factor``).
ALIGNMENT = 2


def partition(trained: Sequence[Parameter], stage: int, shards: int) -> int:
    """Numbers in one rank's float32 partition."""
    if stage == 3:
        return sum(-(-p.size // shards) for p in trained)
    unit = ALIGNMENT * shards
    return -(-sum(p.size for p in trained) // unit) * ALIGNMENT


def held(trained: Sequence[Parameter], stage: int, shards: int) -> Iterator[list[tuple[Parameter, Interval]]]:
    """Rank by rank, which interval of which flattened parameter it holds; of stage 3 the first rank's, the largest."""
    if stage == 3:
        yield [(p, (0, -(-p.size // shards))) for p in trained]
        return
    size = partition(trained, stage, shards)
    first = list(accumulate((p.size for p in trained), initial=0))
    at = 0
    for rank in range(shards):
        piece = rank * size, (rank + 1) * size
        pieces: list[tuple[Parameter, Interval]] = []
        while at > 0 and first[at] > piece[0]:
            at -= 1
        while at < len(trained) and first[at] < piece[1]:
            (interval,) = cuts(first[at], trained[at].size, [piece])
            pieces.append((trained[at], interval))
            at += 1
        yield pieces


def sizes(one: Optimizer, parameters: Iterable[Parameter], stage: int, shards: int) -> tuple[int, int, int, int]:
    """Weights, gradients, state and temporaries of the rank that keeps most, in bytes.

    Weights are the model's, whole before stage 3, and the float32 partition that is stepped; gradients are whole in
    stage 1. Of half precision, a step makes a float32 copy of the partition's gradients.
    """
    parameters = list(parameters)
    trained = [p for p in parameters if p.trained]
    numbers = partition(trained, stage, shards)
    weights = sum(-(-p.size // shards) * p.itemsize if stage == 3 else p.nbytes for p in parameters) + 4 * numbers
    itemsize = max((p.itemsize for p in trained), default=4)
    gradients = sum(p.nbytes for p in trained) if stage == 1 else itemsize * numbers
    temporaries = 4 * numbers if any(p.dtype in HALF for p in trained) else 0
    return weights, gradients, _state(one, trained, stage, shards), temporaries


def takes(one: Optimizer) -> bool:
    """Whether an optimizer steps flat partitions as it steps whole tensors."""
    ours = isinstance(one, Adafactor) and one.sharded and not one.release and not one.compensated
    return ours or isinstance(one, TorchAdamW | AdamW8bit)


def _state(one: Optimizer, trained: Sequence[Parameter], stage: int, shards: int) -> int:
    numbers = partition(trained, stage, shards)
    if not isinstance(one, Adafactor):
        return one.state([Parameter("partition", (numbers,))])
    statistics = 0
    for its in held(trained, stage, shards):
        flats = [FlatPlacement(one.layout(p), (interval,), 0) for p, interval in its]
        kept = sum(flat.kept(slot) for flat in flats for slot in flat.given.slots)
        statistics = max(statistics, 4 * kept)
    momentum = {None: 0, "float32": 4}.get(one.momentum, 2)
    return statistics + 8 * len(trained) + momentum * numbers
