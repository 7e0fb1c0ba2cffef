"""A kernel that stores the random bits of 16 elements. Triton wants kernels at the top of a file."""

import triton
import triton.language as tl

from adafactor.engine.torch.triton.numbers import random_bits


@triton.jit
def kernel(out, start, BLOCK: tl.constexpr):
    place = start.to(tl.int64) + tl.arange(0, BLOCK)
    seed, t = tl.full((), 77, tl.int64), tl.full((), 3, tl.int64)
    tl.store(out + tl.arange(0, BLOCK), random_bits(seed, t, t, place, True).to(tl.int32, bitcast=True))
