"""DTensors through the Triton kernels on two processes, beside the native kernels: python tests/helpers/triton_ranks.py

Prints the shapes that reached Triton, and the largest difference of every parameter after three steps.
"""

import json
import os
import sys
import tempfile
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "1"
sys.path.insert(0, str(Path(__file__).parent))

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import triton_support
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from triton.runtime import interpreter

from adafactor.engine.torch import choose, cuda, triton_table
from adafactor.torch import Adafactor

CASES = (((7, 20), Shard(0)), ((20, 6), Shard(1)), ((33,), Shard(0)), ((6, 10), Replicate()))
reached = []


class Recorded(cuda.Triton):
    def __init__(self, work):
        reached.extend(tuple(w.param.shape) for w in work)
        super().__init__(work)


def trained(mesh, kernels):
    choose.kernels_on = kernels
    generator = torch.Generator().manual_seed(0)
    params = [
        torch.nn.Parameter(distribute_tensor(torch.randn(shape, generator=generator), mesh, [placement]))
        for shape, placement in CASES
    ]
    optimizer = Adafactor(params, beta1=0.9, weight_decay=0.1)
    for _ in range(3):
        for p in params:
            p.grad = distribute_tensor(torch.randn(p.shape, generator=generator), mesh, p.placements)
        optimizer.step()
    return [p.full_tensor().detach() for p in params]


def rank(number, store):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=number, world_size=2)
    interpreter.InterpretedFunction.__call__ = triton_support._call
    interpreter._patch_lang_tensor = triton_support._bounds(interpreter._patch_lang_tensor)
    for name, value in triton_support.SMALL.items():
        setattr(triton_table, name, value)
    mesh = init_device_mesh("cpu", (2,))
    ends = [trained(mesh, kernels) for kernels in (choose.kernels_on, lambda device: Recorded)]
    if number == 0:
        differences = [float((a - b).abs().max()) for a, b in zip(*ends, strict=True)]
        print(json.dumps({"reached": sorted(set(reached)), "differences": differences}), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(rank, (f"{folder}/store",), 2)
