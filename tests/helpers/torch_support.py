"""What several tests of the PyTorch front end need: parameters, a tiny model, and loops that step."""

import numpy as np
import torch

from adafactor.torch import Adafactor
from adafactor.torch.arguments import VOCABULARY


def parameter(*shape, dtype=torch.float32):
    return torch.nn.Parameter(torch.randn(*shape).to(dtype))


def parameters(shapes, dtype=torch.float32):
    """The same numbers at every call."""
    generator = torch.Generator().manual_seed(1)
    return [torch.nn.Parameter(torch.randn(s, generator=generator).to(dtype)) for s in shapes]


def model():
    return torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2))


def set_gradients(optimizer, generator):
    for group in optimizer.param_groups:
        for param in group["params"]:
            if param.requires_grad:
                param.grad = torch.randn(param.shape, generator=generator).to(param.device, param.dtype)


def step(optimizer, seed=0):
    """One step from gradients that the seed decides."""
    set_gradients(optimizer, torch.Generator().manual_seed(seed))
    return optimizer.step()


def train(optimizer, steps, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        set_gradients(optimizer, generator)
        optimizer.step()


def words(options):
    """A trajectory's options as the class takes them."""
    given = {VOCABULARY.get(name, name): value for name, value in options.items()}
    given["lr"] = given.pop("learning_rate", 1e-2)
    if "eps[0]" in given:
        given["eps"] = given.pop("eps[0]"), given.pop("eps[1]")
    return given


def tensor(array, **place):
    """Of the array's dtype, bfloat16 too; ``place`` as ``Tensor.to`` takes it."""
    return torch.from_numpy(np.asarray(array).astype(np.float64)).to(dtype=getattr(torch, array.dtype.name), **place)


def follow(trajectories, steps, groups=None, place=None, **options):
    """One optimizer over all parameters, each with its group's options and beside its oracle; returns the optimizer."""
    place = place or {}
    params = [torch.nn.Parameter(tensor(one.start, **place)) for one in trajectories]
    members = [{"params": [p], **own} for p, own in zip(params, groups or [{}] * len(params), strict=True)]
    optimizer = Adafactor(members, **options)
    for _ in range(steps):
        for p, one in zip(params, trajectories, strict=True):
            p.grad = tensor(one.next_gradient(), **place)
        optimizer.step()
        for p, one in zip(params, trajectories, strict=True):
            one.check(p.detach().cpu().double().numpy())
    for p, one in zip(params, trajectories, strict=True):
        state, moments = optimizer.state[p], one.oracle.state.second_moment
        one.check_state(int(state["step"]), {name: state[name].cpu().numpy() for name in moments})
    return optimizer
