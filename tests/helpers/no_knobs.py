"""The kernels' modules under a Triton that has no ``knobs``, as before 3.4: imported, and run in the interpreter."""

import os

os.environ["TRITON_INTERPRET"] = "1"
import triton

if hasattr(triton, "knobs"):  # its own modules have imported what they need of it
    del triton.knobs

from adafactor.engine.torch import triton_kernels, triton_numbers

assert triton_numbers.interpreted()
assert triton_kernels.dtype("float32") == triton.language.float32
