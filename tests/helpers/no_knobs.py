"""The kernels' modules under a Triton that has no ``knobs``, as before 3.4: imported, and run in the interpreter."""

import os

os.environ["TRITON_INTERPRET"] = "1"
import triton

if hasattr(triton, "knobs"):  # its own modules have imported what they need of it
    del triton.knobs

from adafactor.engine.torch.triton import kernels, numbers

assert numbers.interpreted()
assert kernels.dtype("float32") == triton.language.float32
