"""What every rank does in ``test_sharded.py``."""

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from adafactor.convert import torch as torch_files
from adafactor.torch import Adafactor

SHAPES = {"matrix": (6, 4), "vector": (5,)}


def trained(mesh):
    """Three steps; sharded along the first axis where there is a mesh."""
    generator = torch.Generator().manual_seed(0)

    def draw(shape):
        value = torch.randn(shape, generator=generator)
        return value if mesh is None else distribute_tensor(value, mesh, [Shard(0)])

    params = {name: torch.nn.Parameter(draw(shape)) for name, shape in SHAPES.items()}
    optimizer = Adafactor(params.items(), lr=0.1, beta1=0.9)
    for _ in range(3):
        for param in params.values():
            param.grad = draw(param.shape)
        optimizer.step()
    return optimizer


def moved(rank, world):
    """The state that one process reaches; that of the shards, gathered; and the former, taken up by the latter."""
    alone = torch_files.read(trained(None))
    optimizer = trained(init_device_mesh("cpu", (world,)))
    gathered = torch_files.read(optimizer)
    optimizer.load_state_dict(torch_files.write(alone, "adafactor.torch", template=optimizer))
    taken = torch_files.read(optimizer)
    return [
        {
            p.name: (p.layout.slots, p.count, p.rms, {k: torch.from_numpy(v) for k, v in p.slots.items()})
            for p in s.parameters
        }
        for s in (alone, gathered, taken)
    ]
