"""Stochastic rounding in NumPy, bit for bit what the native kernels do: the definition for every other backend.

The random number of an element is a hash of the seed, the update, the tensor and the element's index in the whole
parameter, so that neither threads nor shards change it. ``native/random.h`` states it in 32-bit words.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Bits = NDArray[np.uint32]

_MASK = 0xFFFFFFFF


def mix(h: int) -> int:
    """One round of a 32-bit hash (Chris Wellons' lowbias32)."""
    h ^= h >> 16
    h = h * 0x7FEB352D & _MASK
    h ^= h >> 15
    h = h * 0x846CA68B & _MASK
    return h ^ (h >> 16)


def keys(seed: int, step: int, tensor: int, high: int = 0) -> tuple[int, int]:
    """The two keys of a tensor's update; ``high`` is the upper half of the 64-bit element index."""
    k = 0
    for word in (seed & _MASK, seed >> 32, step & _MASK, tensor & _MASK, high):
        k = mix(k ^ word) + 0x9E3779B9 & _MASK
    return k, mix(k ^ 0x85EBCA6B)


def random_bits(seed: int, step: int, tensor: int, index: NDArray[Any]) -> Bits:
    """32 random bits for every element of ``index``, the elements' indices in the whole parameter."""
    index = np.asarray(index, np.uint64)
    bits = np.empty(index.shape, np.uint32)
    high = (index >> np.uint64(32)).astype(np.uint32)
    for upper in np.unique(high):
        k0, k1 = keys(seed, step, tensor, int(upper))
        chosen = high == upper
        h = index[chosen].astype(np.uint32) + np.uint32(k0)
        h ^= h >> np.uint32(16)
        h *= np.uint32(0x7FEB352D)
        h ^= (h >> np.uint32(15)) ^ np.uint32(k1)
        h *= np.uint32(0x846CA68B)
        bits[chosen] = h ^ (h >> np.uint32(16))
    return bits


def bfloat16(x: NDArray[np.float32], bits: Bits) -> NDArray[np.uint16]:
    """``x`` rounded to bfloat16, as its bits: up with the probability of the part that is cut off.

    Adds the upper 16 random bits below the last place and cuts. Finite numbers stay finite, NaN stays NaN.
    """
    u = x.view(np.uint32)
    magnitude = u & np.uint32(0x7FFFFFFF)
    total = magnitude + (bits >> np.uint32(16))
    total = np.where(magnitude < 0x7F800000, np.minimum(total, np.uint32(0x7F7FFFFF)), total)
    total = np.where(magnitude > 0x7F800000, magnitude | np.uint32(0x400000), total)
    return np.asarray((total | (u & np.uint32(0x80000000))) >> np.uint32(16), np.uint16)


def float16(x: NDArray[np.float32], bits: Bits) -> NDArray[np.uint16]:
    """``x`` rounded to float16, as its bits, with the upper 13 random bits.

    Subnormal results, whose steps are 2^-24, are counted in fixed point with 13 bits behind the point.
    """
    u = x.view(np.uint32)
    magnitude = u & np.uint32(0x7FFFFFFF)
    r = bits >> np.uint32(19)
    small = magnitude < 0x38800000
    steps = (np.where(small, magnitude, 0).astype(np.uint32).view(np.float32) * np.float32(2.0**37)).astype(np.uint32)
    h = np.where(small, (steps + r) >> np.uint32(13), (magnitude + r - np.uint32(112 << 23)) >> np.uint32(13))
    h = np.where(magnitude >= 0x477FE000, 0x7BFF, h)
    h = np.where(magnitude == 0x7F800000, 0x7C00, h)
    h = np.where(magnitude > 0x7F800000, 0x7E00 | ((magnitude >> np.uint32(13)) & np.uint32(0x3FF)), h)
    return np.asarray(h | ((u >> np.uint32(16)) & np.uint32(0x8000)), np.uint16)
