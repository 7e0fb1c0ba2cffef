"""Triton device functions: how one number is stored. Counted random bits, stochastic rounding, 8-bit momentum.

The bits and the roundings are those of ``rounding.py``, the 8-bit code is that of ``int8.py``.
"""

from __future__ import annotations

import os

import triton
import triton.language as tl

from adafactor.engine.torch.int8 import BLOCK, LARGEST

_GOLDEN = tl.constexpr(0x9E3779B9)
_BLOCK = tl.constexpr(BLOCK)
_LARGEST = tl.constexpr(float(LARGEST))
_SQUARE = tl.constexpr(float(LARGEST * LARGEST))


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter; Triton before 3.4 has no ``knobs``."""
    knobs = getattr(triton, "knobs", None)
    return os.environ.get("TRITON_INTERPRET", "0") == "1" if knobs is None else bool(knobs.runtime.interpret)


# The interpreter cuts bfloat16 instead of rounding it; what a device does is compiled.
_INTERPRETED = tl.constexpr(interpreted())


@triton.jit
def narrow(x, DTYPE: tl.constexpr):
    """x rounded to nearest, ties to even."""
    if _INTERPRETED and DTYPE == tl.bfloat16:
        u = x.to(tl.uint32, bitcast=True)
        nearest = tl.where((u & 0x7FFFFFFF) > 0x7F800000, u | 0x400000, u + 0x7FFF + ((u >> 16) & 1))
        return (nearest >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return x.to(DTYPE)


@triton.jit
def _mix(h, key):
    h = (h ^ (h >> 16)) * 0x7FEB352D
    h = (h ^ (h >> 15) ^ key) * 0x846CA68B
    return h ^ (h >> 16)


@triton.jit
def random_bits(seed, t, rng_stream, number, HUGE: tl.constexpr):
    """32 random bits per element; ``number``: int64, row-major. HUGE: there are numbers beyond 2**32."""
    none = tl.full((), 0, tl.uint32)
    k = _mix(seed.to(tl.uint32), none) + _GOLDEN
    k = _mix(k ^ (seed >> 32).to(tl.uint32), none) + _GOLDEN
    k = _mix(k ^ t.to(tl.uint32), none) + _GOLDEN
    k = _mix(k ^ rng_stream.to(tl.uint32), none) + _GOLDEN
    if HUGE:
        k = k ^ (number >> 32).to(tl.uint32)
    k = _mix(k, none) + _GOLDEN
    return _mix(number.to(tl.uint32) + k, _mix(k ^ 0x85EBCA6B, none))


@triton.jit
def stochastic_bfloat16(x, bits):
    """The 16 bits of x, rounded up with the probability of what is cut off. Finite numbers stay finite."""
    u = x.to(tl.uint32, bitcast=True)
    magnitude = u & 0x7FFFFFFF
    total = magnitude + (bits >> 16)
    total = tl.where((magnitude < 0x7F800000) & (total > 0x7F7FFFFF), 0x7F7FFFFF, total)
    total = tl.where(magnitude > 0x7F800000, magnitude | 0x400000, total)
    return ((total | (u & 0x80000000)) >> 16).to(tl.uint16)


@triton.jit
def stochastic_float16(x, bits):
    """The same for float16, whose subnormal numbers are counted in steps of 2**-24 with 13 bits behind the point."""
    u = x.to(tl.uint32, bitcast=True)
    magnitude = u & 0x7FFFFFFF
    r = bits >> 19
    small = magnitude < 0x38800000
    fixed = (tl.where(small, magnitude, 0).to(tl.float32, bitcast=True) * 137438953472.0).to(tl.uint32)  # 2**37
    h = tl.where(small, (fixed + r) >> 13, (magnitude + r - 0x38000000) >> 13)
    h = tl.where(magnitude >= 0x477FE000, 0x7BFF, h)
    h = tl.where(magnitude == 0x7F800000, 0x7C00, h)
    h = tl.where(magnitude > 0x7F800000, 0x7E00 | ((magnitude >> 13) & 0x3FF), h)
    return (h | ((u >> 16) & 0x8000)).to(tl.uint16)


@triton.jit
def decode(code, scale):
    q = code.to(tl.float32)
    return q * tl.abs(q) * (scale / _SQUARE)


@triton.jit
def encode(value, bits, SIZE: tl.constexpr):
    """The code of every number of a tile, and the scale of its block; 256 neighbours of the tile are a block."""
    # The bits of magnitudes are in the order of the numbers, and those of NaN above all.
    magnitude = (value.to(tl.uint32, bitcast=True) & 0x7FFFFFFF).to(tl.int32, bitcast=True)
    largest = tl.max(tl.reshape(magnitude, (SIZE // _BLOCK, _BLOCK)), axis=1).to(tl.float32, bitcast=True)
    scale = largest + largest * 0.0  # a number that is not finite makes the scale, and so the whole block, NaN
    inverse = _SQUARE / tl.where(scale > 0, scale, 1.0)
    wide = tl.broadcast_to(tl.expand_dims(inverse, 1), (SIZE // _BLOCK, _BLOCK))
    square = tl.abs(value) * tl.reshape(wide, value.shape)
    below = tl.floor(tl.sqrt(square))
    drawn = (bits & 0xFFFF).to(tl.float32) * 0.0000152587890625  # 2**-16
    q = below + tl.where(drawn * (2 * below + 1) < square - below * below, 1.0, 0.0)
    q = tl.minimum(q, _LARGEST)  # a quotient rounded up may exceed 1, a device's approximate one anyway
    return tl.where(value < 0, -q, q).to(tl.int8), scale


@triton.jit
def move(
    param, momentum, scales, residual, offset, numbered, mask, coded, known, u, decay_factor, alpha, beta1,
    seed, t, rng_stream,
    PARAM: tl.constexpr, MOMENTUM: tl.constexpr, STOCHASTIC: tl.constexpr, COMPENSATED: tl.constexpr,
    HUGE: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """Equations 12 and 13 for one tile: average the update, add it to the parameter, store both.

    Args:
        param, momentum, scales, residual: where the tensors begin.
        offset: int64, every element's in them; ``numbered``: its number in the whole parameter, for random bits.
        coded: int64 (SIZE / 256,), the offset of the scale of each 256 elements of 8-bit momentum; ``known``: is there.
        u: the normalised update times 1 - beta1, or without momentum times alpha.
        SIZE: elements of the tile.

    Returns:
        The stored parameter, float32.
    """
    if STOCHASTIC or MOMENTUM == tl.int8:
        bits = random_bits(seed, t, rng_stream, numbered, HUGE)
    if MOMENTUM == tl.int8:
        scale = tl.load(scales + coded, mask=known, other=0)
        wide = tl.broadcast_to(tl.expand_dims(scale, 1), (SIZE // _BLOCK, _BLOCK))
        old = decode(tl.load(momentum + offset, mask=mask, other=0), tl.reshape(wide, offset.shape))
        u = tl.where(mask, beta1 * old + u, 0.0)
        code, scale = encode(u, bits, SIZE)
        tl.store(momentum + offset, code, mask=mask)
        tl.store(scales + coded, scale, mask=known)
        u = alpha * u
    elif MOMENTUM is not None:
        u = beta1 * tl.load(momentum + offset, mask=mask, other=0).to(tl.float32) + u
        tl.store(momentum + offset, narrow(u, MOMENTUM), mask=mask)
        u = alpha * u
    x = tl.load(param + offset, mask=mask, other=0).to(tl.float32)
    if COMPENSATED:
        x += tl.load(residual + offset, mask=mask, other=0).to(tl.float32)
    x = decay_factor * x - u
    if STOCHASTIC:
        if PARAM == tl.bfloat16:
            stored = stochastic_bfloat16(x, bits).to(PARAM, bitcast=True)
        else:
            stored = stochastic_float16(x, bits).to(PARAM, bitcast=True)
    else:
        stored = narrow(x, PARAM)
    tl.store(param + offset, stored, mask=mask)
    wide = stored.to(tl.float32)
    if COMPENSATED:
        rest = tl.where(wide - wide == 0, x - wide, 0.0)  # of what is not finite nothing is left
        tl.store(residual + offset, narrow(rest, tl.bfloat16), mask=mask)
    return tl.where(mask, wide, 0.0)
