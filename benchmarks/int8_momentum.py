"""Why 8-bit momentum is rounded at random: python benchmarks/int8_momentum.py

Root mean square error of an average of 16,384 numbers after 5 / (1 - beta1) updates, relative to the same average in
float64. Equal: the average has settled, then every update is the same, another one. Noisy: updates are drawn from
N(c, 1), where c is drawn from N(0, 0.1²), and the average starts at 0.
"""

from __future__ import annotations

import torch

from adafactor.engine.torch import int8

COUNT = 1 << 14


def error(beta1: float, nearest: bool, noisy: bool) -> float:
    generator = torch.Generator().manual_seed(0)
    start = torch.zeros(COUNT) if noisy else 0.5 * torch.randn(COUNT, generator=generator)
    mean = (0.1 if noisy else 1.0) * torch.randn(COUNT, generator=generator)
    codes, scale = int8.encode(start)
    exact = int8.decode(codes, scale).double()
    for _ in range(round(5 / (1 - beta1))):
        update = mean + torch.randn(COUNT, generator=generator) if noisy else mean
        draws = torch.randint(-(1 << 31), 1 << 31, (COUNT,), dtype=torch.int64, generator=generator).to(torch.int32)
        exact = beta1 * exact + (1 - beta1) * update.double()
        average = beta1 * int8.decode(codes, scale) + (1 - beta1) * update
        codes, scale = int8.encode(average, None if nearest else draws)
    stored = int8.decode(codes, scale).double()
    return ((stored - exact).square().mean() / exact.square().mean()).sqrt().item()


def main() -> None:
    print(f"{'beta1':>6} {'equal, nearest':>16} {'at random':>10} {'noisy, nearest':>16} {'at random':>10}")
    for beta1 in (0.9, 0.99, 0.999):
        values = [error(beta1, nearest, noisy) for noisy in (False, True) for nearest in (True, False)]
        print("{:>6} {:16.1%} {:10.1%} {:16.1%} {:10.1%}".format(beta1, *values))


if __name__ == "__main__":
    main()
