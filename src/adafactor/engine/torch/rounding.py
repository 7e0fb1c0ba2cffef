"""Stochastic rounding to bfloat16 and float16 from counted, not drawn, random bits.

A bfloat16 weight of 0.02 has neighbours 2**-13 away and cannot take a step of 1e-5 when rounded to nearest.
Rounded up with the probability of what was cut off, it takes the step on average.

The bits are a function of the seed, the update, the tensor and the element's place in the tensor. So they do not
depend on threads, block sizes, strides or devices, and a run resumed from a checkpoint continues them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from adafactor.core.factoring import Layout, Part
from adafactor.core.rounding import mix

_MASK = 0xFFFFFFFF
_GOLDEN = 0x9E3779B9


def _signed(word: int) -> int:
    """A 32-bit word as torch's int32 holds it."""
    return (word & _MASK) - (1 << 32 if word >> 31 & 1 else 0)


def _mix(x: Tensor, key: Tensor | int = 0) -> Tensor:
    """``mix`` of an int32 tensor. Products wrap around; >> copies the sign, which the masks take off again."""
    x = (x ^ ((x >> 16) & 0xFFFF)) * _signed(0x7FEB352D)
    x = (x ^ ((x >> 15) & 0x1FFFF) ^ key) * _signed(0x846CA68B)
    return x ^ ((x >> 16) & 0xFFFF)


def random_bits(seed: int, step: Tensor, tensor: int, index: Tensor) -> Tensor:
    """32 random bits per element: those of ``rounding.py``, in torch operations.

    Args:
        seed: a 64-bit integer.
        step: the update t counted from 1, an int64 tensor of shape ().
        tensor: the parameter's place among the optimizer's parameters.
        index: int64, each element's row-major place in the whole parameter, whatever its strides.

    Returns:
        int32, of the shape of ``index``.
    """
    known = 0
    for word in (seed, seed >> 32):
        known = mix(known ^ (word & _MASK)) + _GOLDEN & _MASK
    k = _mix(step.to(torch.int32) ^ _signed(known)) + _signed(_GOLDEN)
    k = _mix(k ^ _signed(tensor)) + _signed(_GOLDEN)
    k = _mix(k ^ (index >> 32).to(torch.int32)) + _signed(_GOLDEN)
    return _mix(index.to(torch.int32) + k, _mix(k ^ _signed(0x85EBCA6B)))


def row_major(layout: Layout, block: Sequence[slice] | None, device: torch.device) -> Tensor:
    """The row-major place in the whole parameter of every element of a block: int64, of the block's shape."""
    if block is None and not isinstance(layout, Part):
        return torch.arange(layout.size, dtype=torch.int64, device=device).view(layout.shape)
    whole, offset = (layout.shape, (0,) * len(layout.shape))
    if isinstance(layout, Part):
        whole, offset = layout.whole_shape, layout.offset
    places = torch.zeros((), dtype=torch.int64, device=device)
    stride = 1
    for axis in reversed(range(len(whole))):
        start, stop = (0, layout.shape[axis]) if block is None else block[axis].indices(layout.shape[axis])[:2]
        steps = torch.arange(start + offset[axis], stop + offset[axis], dtype=torch.int64, device=device) * stride
        places = places + steps.view(-1, *(1,) * (len(whole) - 1 - axis))
        stride *= whole[axis]
    return places


def stochastic_round(x: Tensor, dtype: torch.dtype, bits: Tensor) -> Tensor:
    """Round float32 to one of its two neighbours in ``dtype``, with the probabilities that keep its mean.

    Between neighbours lie 2**k float32 numbers (k = 16 for bfloat16, 13 for float16):

        x                          sign exponent | kept digits | k digits to go
        + the upper k random bits                                r r r … r
        - the last k digits                                      0 0 0 … 0     a carry has moved x to the next neighbour

    float16 numbers below 2**-14 are multiples of 2**-24 instead, and are rounded as such. Finite numbers stay finite,
    and what is not finite stays.
    """
    k = 16 if dtype == torch.bfloat16 else 13
    noise = (bits >> (32 - k)) & ((1 << k) - 1)
    rounded = ((x.view(torch.int32) + noise) & -(1 << k)).view(torch.float32)
    if dtype == torch.float16:
        # 2**37 |x| counts multiples of 2**-24 with k binary digits behind the point; what is left is cut.
        fixed = (x.abs().clamp(max=2.0**-14) * 2.0**37).to(torch.int32)
        multiple = ((fixed + noise) >> k).to(torch.float32) * 2.0**-24
        rounded = torch.where(x.abs() < 2.0**-14, torch.copysign(multiple, x), rounded)
    largest = torch.finfo(dtype).max
    return torch.where(torch.isfinite(x), rounded.clamp(-largest, largest), x).to(dtype)
