"""A kernel that stores numbers as 8-bit momentum does. Triton wants kernels at the top of a file."""

import triton
import triton.language as tl

from adafactor.engine.torch.triton.numbers import encode


@triton.jit
def kernel(values, codes, scales, bits, SIZE: tl.constexpr):
    place = tl.arange(0, SIZE)
    drawn = (tl.zeros((SIZE,), tl.int64) + bits).to(tl.uint32)
    code, scale = encode(tl.load(values + place), drawn, SIZE)
    tl.store(codes + place, code)
    tl.store(scales + tl.arange(0, SIZE // 256), scale)
