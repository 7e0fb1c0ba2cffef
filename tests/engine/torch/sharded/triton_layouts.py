"""The layouts of ``layouts.py`` with every part on the Triton kernels, in their interpreter."""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"

from typing import Any

import layouts
import torch
import triton_support
from triton.runtime import interpreter

from adafactor.core.factoring import Part
from adafactor.engine.torch import choose, cuda
from adafactor.engine.torch.triton import forms, table
from adafactor.engine.torch.work import Work

VARIANTS = {2: ("native", "momentum, decay", "smallest, d=0.5", "experts"), 4: ("momentum, decay", "experts")}
SHAPES = [(16, 40), (7, 5), (8, 4, 6), (6, 4, 3, 3), (9,)]  # with tiles as small as the tests': several of everything


def compare(rank: int, world: int) -> dict[str, Any]:
    """Differences from one process's native step, and the parts that went another way, by layout of the parameter."""
    interpreter.InterpretedFunction.__call__ = triton_support._call
    interpreter._patch_lang_tensor = triton_support._bounds(interpreter._patch_lang_tensor)
    for name, value in (triton_support.SMALL | {"TRANSPOSED": 8}).items():
        setattr(table, name, value)
    elsewhere: list[str] = []
    native_or_eager = choose.kernels_for

    def kernels_for(w: Work, grad: torch.Tensor) -> Any:
        if not isinstance(w.layout, Part) or not w.layout.size:
            return native_or_eager(w, grad)
        if forms.form_of(w) is None:
            elsewhere.append(f"{w.layout.whole_shape} {w.layout.cut} rows {w.layout.rows} columns {w.layout.columns}")
            return None
        return cuda.Triton

    choose.kernels_for = kernels_for
    layouts.VARIANTS = {name: layouts.VARIANTS[name] for name in VARIANTS[world]}
    layouts.SHAPES = SHAPES
    return {
        "differences": layouts.compare(rank, world, steps=2),
        "left alone": layouts.left_alone_later(rank, world),
        "elsewhere": sorted(set(elsewhere)),
    }
