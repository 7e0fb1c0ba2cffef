"""Stochastic rounding to bfloat16 and float16 from counted, not drawn, random bits.

A bfloat16 weight of 0.02 has neighbours 2**-13 away and cannot take a step of 1e-5 when rounded to nearest.
Rounded up with the probability of what was cut off, it takes the step on average.

The bits are a function of the seed, the update, the tensor and the element's place in the tensor. So they do not
depend on threads, block sizes, strides or devices, and a run resumed from a checkpoint continues them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_M1, _M2 = 0x7FEB352D, 0x846CA68B - (1 << 32)  # "lowbias32", as signed 32-bit numbers


def mix(x: int) -> int:
    """A bijection of 32-bit words in which every input bit moves about half of the output bits."""
    x &= _MASK
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & _MASK
    x = ((x ^ (x >> 15)) * 0x846CA68B) & _MASK
    return x ^ (x >> 16)


def mix_tensor(x: Tensor) -> Tensor:
    """``mix`` of an int32 tensor. Products wrap around; >> copies the sign, which the masks take off again."""
    x = (x ^ ((x >> 16) & 0xFFFF)) * _M1
    x = (x ^ ((x >> 15) & 0x1FFFF)) * _M2
    return x ^ ((x >> 16) & 0xFFFF)


def random_bits(seed: int, step: Tensor, tensor: int, index: Tensor) -> Tensor:
    """32 random bits per element, in unsigned 32-bit arithmetic

        key  = mix(mix(mix(mix(seed_low) + seed_high) + tensor) + step)
        bits = mix(mix(key + index_high) + index_low)

    Args:
        seed: a 64-bit integer.
        step: the update t counted from 1, an int64 tensor of shape ().
        tensor: the parameter's place among the optimizer's parameters.
        index: int64, each element's row-major place in the whole parameter, whatever its strides.

    Returns:
        int32, of the shape of ``index``.
    """
    key = mix(mix(mix(seed & _MASK) + (seed >> 32 & _MASK)) + tensor)
    signed = key - (1 << 32) if key >> 31 else key
    stepped = mix_tensor(step.to(torch.int32) + signed)
    return mix_tensor(mix_tensor(stepped + (index >> 32).to(torch.int32)) + index.to(torch.int32))


def row_major(shape: Sequence[int], block: Sequence[slice] | None, device: torch.device) -> Tensor:
    """The row-major place of every element of a block in a tensor of ``shape``: int64, of the block's shape."""
    if block is None:
        return torch.arange(math.prod(shape), dtype=torch.int64, device=device).view(tuple(shape))
    places = torch.zeros((), dtype=torch.int64, device=device)
    stride = 1
    for axis in reversed(range(len(shape))):
        start, stop, _ = block[axis].indices(shape[axis])
        steps = torch.arange(start, stop, dtype=torch.int64, device=device) * stride
        places = places + steps.view(-1, *(1,) * (len(shape) - 1 - axis))
        stride *= shape[axis]
    return places


def stochastic_round(x: Tensor, dtype: torch.dtype, bits: Tensor) -> Tensor:
    """Round float32 to one of its two neighbours in ``dtype``, with the probabilities that keep its mean.

    Between neighbours lie 2**k float32 numbers (k = 16 for bfloat16, 13 for float16):

        x                sign exponent | kept digits | k digits to go
        + a random word of k bits                      r r r … r
        - the last k digits                            0 0 0 … 0     a carry has moved x to the next neighbour

    float16 numbers below 2**-14 are multiples of 2**-24 instead, and are rounded as such. What is not finite stays.
    """
    k = 16 if dtype == torch.bfloat16 else 13
    noise = bits & ((1 << k) - 1)
    rounded = ((x.view(torch.int32) + noise) & -(1 << k)).view(torch.float32)
    if dtype == torch.float16:
        multiple = torch.floor(x.abs() * 2.0**24 + noise * 2.0**-13) * 2.0**-24
        rounded = torch.where(x.abs() < 2.0**-14, torch.copysign(multiple, x), rounded)
    return torch.where(torch.isfinite(x), rounded, x).to(dtype)
