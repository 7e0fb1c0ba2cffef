"""What several tests of the PyTorch front end need: parameters, a tiny model, and loops that step."""

import torch


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
