"""The optimizer's step on sharded matrices: run with 1, 2, … processes, the same work in all.

torchrun --nproc-per-node 1 benchmarks/sharding_step.py
torchrun --nproc-per-node 2 benchmarks/sharding_step.py
"""

import os
import statistics

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from adafactor.cli.bench.timing import ratio, seconds, take_turns
from adafactor.torch import Adafactor

SHAPES = [(2048, 512), (512, 2048), (1024, 1024)] * 8
STEPS = 30
OURS = "Adafactor"
OPTIMIZERS = {
    OURS: lambda params: Adafactor(params, lr=1e-2),
    "AdamW, fused": lambda params: torch.optim.AdamW(params, lr=1e-3, fused=True),
}


def slowest(step):
    """The seconds of a step that begins on all ranks together, until the last one has done it."""
    dist.barrier()
    return seconds(lambda: (step(), dist.barrier()))


def main() -> None:
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for placement in (Shard(0), Shard(1)):
        steps = {}
        for name, make in OPTIMIZERS.items():
            params = [nn.Parameter(distribute_tensor(torch.randn(shape), mesh, [placement])) for shape in SHAPES]
            for p in params:
                p.grad = distribute_tensor(torch.randn(p.shape), mesh, [placement])
            steps[name] = make(params).step
        times = take_turns(steps, STEPS, slowest)
        if dist.get_rank() == 0:
            total = sum(n * m for n, m in SHAPES)
            print(f"{placement}, {dist.get_world_size()} ranks, {total / 1e6:.0f} M parameters")
            for name, taken in times.items():
                best, middle = 1e3 * min(taken), 1e3 * statistics.median(taken)
                print(
                    f"{name:<16} median {middle:.1f} ms, best {best:.1f} ms, {ratio(times, name, OURS):.2f} times ours"
                )
    dist.destroy_process_group()


if __name__ == "__main__":
    os.environ.setdefault("ADAFACTOR_NUM_THREADS", "1")
    main()
