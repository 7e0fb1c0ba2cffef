"""What rounding costs: the relative error of the mean of u^2 from W (eq. 7) and of the statistics of large matrices in
float32, and how far bfloat16 weights get in small steps.

    python tests/helpers/rounding_error.py

The first is over matrices of random shapes whose rows and columns differ by up to ten orders of magnitude, a tenth of
them without any gradient, and compares with u formed element by element in float64. ``docs/numerics.md`` and
``docs/torch.md`` show what this prints.
"""

import argparse

import numpy as np

from adafactor import Hyperparameters, layout
from adafactor.core import reference

HP = Hyperparameters(clip_threshold=None, scale_parameter=False, relative_step=False)


def problem(rng, steps):
    """Float32 gradients of one random matrix."""
    shape = tuple(int(side) for side in 10 ** rng.uniform(0, 2.5, 2))
    scales = [10 ** rng.uniform(-5, 5, side) * (rng.random(side) > 0.1) for side in shape]
    scale = np.outer(*scales)
    return [np.asarray(scale * rng.standard_normal(shape), np.float32) for _ in range(steps)]


def element_by_element(gradients):
    """The mean of u^2 in each update, from its definition."""
    oracle = reference.Adafactor(layout(gradients[0].shape), HP)
    for g in gradients:
        oracle.step(np.zeros(g.shape), g, 0.0)
        row, column = oracle.state.second_moment["row"], oracle.state.second_moment["column"]
        v = np.outer(row, column) / row.mean()
        yield np.mean(np.square(np.float64(g)) / v)


def in_float32(gradients):
    """The same from eq. 7, by the oracle in float32."""
    its = layout(gradients[0].shape)
    state = reference.init(its, HP, np.float32)
    x = np.zeros(its.shape, np.float32)
    for t, g in enumerate(gradients, 1):
        sums = reference.measure(x, g, state, its, HP, t)
        _, state = reference.apply(x, g, sums, state, its, HP, t, 0.0)
        column = state.second_moment["column"]
        yield float(np.mean(column) * np.sum(reference.ratio(sums.W[0], column)) / its.size)


def by_torch(gradients, fused):
    """The same as the PyTorch optimizer reports it."""
    import torch

    from adafactor.torch import Adafactor

    parameter = torch.nn.Parameter(torch.zeros(gradients[0].shape))
    options = {"d": None, "scale_parameter": False, "relative_step": False}
    optimizer = Adafactor([("x", parameter)], lr=0.0, fused=fused, diagnostics=True, **options)
    for g in gradients:
        parameter.grad = torch.from_numpy(g)
        optimizer.step()
        yield float(optimizer.diagnostics()["x"]["update_rms"]) ** 2


def worst(implementation, problems=300, steps=30, seed=0):
    """The largest relative error over all updates of all problems."""
    rng = np.random.default_rng(seed)
    largest = 0.0
    for _ in range(problems):
        gradients = problem(rng, steps)
        for found, exact in zip(implementation(gradients), element_by_element(gradients), strict=True):
            largest = max(largest, abs(found - exact) / exact if exact else abs(found))
    return largest


def of_statistics(shape, fused):
    """The largest relative error of row and of column after one update, from normal gradients."""
    import torch

    from adafactor.torch import Adafactor

    parameter = torch.nn.Parameter(torch.zeros(shape))
    parameter.grad = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    optimizer = Adafactor([parameter], lr=0.0, fused=fused)
    optimizer.step()
    for name, axis in (("row", 1), ("column", 0)):
        exact = parameter.grad.double().square().mean(axis)
        yield ((optimizer.state[parameter][name] - exact).abs() / exact).max().item()


def of_small_steps(dtype, steps=200, **options):
    """Updates of one sign, learning rate 1e-5, weights of N(0, 0.02^2): the mean displacement, the share that stays."""
    import torch

    from adafactor.torch import Adafactor

    start = (0.02 * torch.randn(1024, 512, generator=torch.Generator().manual_seed(0))).bfloat16()
    parameter = torch.nn.Parameter(start.to(getattr(torch, dtype), copy=True))
    optimizer = Adafactor([parameter], lr=1e-5, relative_step=False, scale_parameter=False, **options)
    parameter.grad = torch.ones_like(parameter)
    for _ in range(steps):
        optimizer.step()
    moved = parameter.detach().double() - start.double()
    return moved.mean().item(), (moved == 0).double().mean().item()


IMPLEMENTATIONS = {
    "NumPy, float32": in_float32,
    "torch operations": lambda gradients: by_torch(gradients, False),
    "native kernels": lambda gradients: by_torch(gradients, True),
}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="What rounding costs.")
    parser.add_argument("--problems", type=int, default=300)
    parser.add_argument("--steps", type=int, default=30)
    arguments = parser.parse_args()
    for name, implementation in IMPLEMENTATIONS.items():
        print(f"mean of u^2, {name:18} {worst(implementation, arguments.problems, arguments.steps):.1e}")
    for shape in ((4096, 4096), (262144, 64), (64, 262144)):
        for name, fused in (("torch operations", False), ("native kernels", True)):
            row, column = of_statistics(shape, fused)
            print(f"{shape[0]} x {shape[1]}, {name:18} row {row:.1e}  column {column:.1e}")
    far, _ = of_small_steps("float32")
    for name, options in (
        ("nearest", {}),
        ("stochastic", {"stochastic_rounding": True}),
        ("compensated", {"compensated": True}),
    ):
        displacement, unmoved = of_small_steps("bfloat16", **options)
        print(f"small steps, {name:11} {displacement / far:.4f} of float32's displacement, {unmoved:.1%} never moved")
