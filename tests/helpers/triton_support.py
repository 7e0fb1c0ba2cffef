"""Triton kernels under test: on a CUDA device where there is one, otherwise in Triton's interpreter on CPU tensors.

The interpreter must be chosen before Triton is imported; ``quiet_torch`` does it.
"""

import os
import sys

import torch

from adafactor.engine.torch import choose
from adafactor.engine.torch.cuda import Triton
from adafactor.engine.torch.triton import table

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

# Tiles so small that small tensors have several parts, chunks of columns, and programs for every sum.
SMALL = {
    "TILE": 256, "WIDEST": 256, "FLAT": 512, "FLAT_TILE": 256, "COLUMNS": 8, "PART_ROWS": (4, 4),
    "ON_CHIP": 64,
}  # fmt: skip


def interpret():
    """Ask for the interpreter where there is no device."""
    if DEVICE.type == "cpu" and "triton" not in sys.modules:
        os.environ["TRITON_INTERPRET"] = "1"


_prepared = {}


def _call(function, *args, **kwargs):
    """A device function under the interpreter, which prepares the language for it at the first call and for good.

    Triton's own does it at every call, and that takes longer than most functions.
    """
    from triton.runtime import interpreter

    if function.fn not in _prepared:
        _prepared[function.fn] = interpreter._patch_lang(function.fn)
    return function.rewrite()(*args, **kwargs)


def _bounds(patch):
    """The interpreter's patch of ``tl.tensor``, whose bounds of loops NumPy 2.4 and later refuses before Triton 3.7."""

    def patched(tensor, *scope):
        patch(tensor, *scope)
        tensor.__index__ = lambda self: int(self.handle.data.item())

    return patched


def use(monkeypatch, small=True):
    """Send every tensor of every optimizer to Triton kernels, unless it says ``fused=False``."""
    if DEVICE.type == "cpu":
        from triton.runtime import interpreter

        from adafactor.engine.torch.triton.numbers import interpreted

        assert interpreted(), "Triton was imported too early: run tests/engine/torch by itself"
        monkeypatch.setattr(interpreter.InterpretedFunction, "__call__", _call)
        monkeypatch.setattr(interpreter, "_patch_lang_tensor", _bounds(interpreter._patch_lang_tensor))
    if small:
        for name, value in SMALL.items():
            monkeypatch.setattr(table, name, value)
    monkeypatch.setattr(choose, "kernels_on", lambda device: Triton)
