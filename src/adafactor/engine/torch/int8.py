"""The 8-bit code of momentum, in torch operations.

256 neighbours in row-major order share a float32 scale s, their largest absolute value. A number m is stored as
q in [-127, 127] that stands for

    s · sign(q) · (q / 127)²

fine near zero, where most of an average lies: two neighbouring numbers are s · (2|q| + 1) / 127² apart. It is
rounded to either neighbour with the probabilities that keep its mean, from the lower 16 of the random bits that
round the parameter. What is stored differs from m by less than

    s · (2 √(|m|/s) / 127 + 1/127²)        at most 1.6 % of s, 0.006 % of s near zero

and the largest number of a block is exact. Rounded to nearest, a slow average would freeze, for a step of
(1 - beta1) times what is left of the way is soon less than half of what lies between two codes: after 5 / (1 - beta1)
equal updates its error is 8 %, 47 % and 110 % of the average at beta1 = 0.9, 0.99 and 0.999, drawn it is 1.2 %
(benchmarks/int8_momentum.py).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import product

import torch
from torch import Tensor

from adafactor.core.factoring import Shape

BLOCK = 256
LARGEST = 127


def scales(size: int) -> int:
    """How many scales ``size`` elements have."""
    return -(-size // BLOCK)


def decode(codes: Tensor, scale: Tensor) -> Tensor:
    """The numbers behind ``codes``: float32, of their shape.

    Args:
        codes: int8, contiguous.
        scale: float32 of shape (scales(codes.numel()),).
    """
    q = codes.reshape(-1).to(torch.float32)
    wide = (scale / float(LARGEST**2)).repeat_interleave(BLOCK)[: q.numel()]
    return (q * q.abs() * wide).view(codes.shape)


def encode(values: Tensor, bits: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Codes, int8 of the shape of ``values``, and their scales.

    Args:
        values: float32, in row-major order from the beginning of a block.
        bits: int32 of the same shape, 32 random bits each; ``None`` rounds to nearest.
    """
    flat = values.reshape(-1)
    size = flat.numel()
    padded = torch.nn.functional.pad(flat, (0, -size % BLOCK)).view(-1, BLOCK)
    scale = padded.abs().amax(1) + (padded * 0).sum(1)  # what is not finite makes its block NaN
    wide = scale.unsqueeze(1)
    square = torch.where(wide > 0, padded.abs() / torch.where(wide > 0, wide, 1.0), 0.0) * float(LARGEST**2)
    below = square.sqrt().floor_()
    share = ((square - below * below) / (2 * below + 1)).view(-1)[:size]
    chance = 0.5 if bits is None else (bits.reshape(-1) & 0xFFFF).to(torch.float32) * 2.0**-16
    q = below.view(-1)[:size] + (share > chance)
    return torch.where(flat < 0, -q, q).to(torch.int8).view(values.shape), scale


def slabs(shape: Shape, limit: int) -> Iterator[tuple[slice, ...]]:
    """Cut a shape into pieces that are one run of row-major order each and begin where a block of 256 begins.

    A piece has about ``limit`` elements; more where fewer would not begin with a block, up to 256 times an
    index of its axis.
    """
    axis = 0
    # Go on to an inner axis while one index of this one is too long and is a number of whole blocks.
    while axis + 1 < len(shape):
        inner = math.prod(shape[axis + 1 :])
        if shape[axis] > 1 and (inner <= limit or inner % BLOCK):
            break
        axis += 1
    inner, length = math.prod(shape[axis + 1 :]), shape[axis] if shape else 1
    step = BLOCK // math.gcd(inner, BLOCK)
    step *= max(1, limit // (inner * step))
    for index in product(*map(range, shape[:axis])):
        for start in range(0, length, step):
            piece = [slice(i, i + 1) for i in index] + [slice(start, min(start + step, length))]
            yield (*piece, *(slice(0, n) for n in shape[axis + 1 :]))[: len(shape)]
