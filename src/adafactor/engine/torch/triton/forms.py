"""Which Triton launch updates a tensor, if any can: from the work as PyTorch has it to the kernels' forms."""

from __future__ import annotations

import torch

from adafactor.core.canonical import Canonical, canonical
from adafactor.core.factoring import Part
from adafactor.engine.torch.cpu import in_memory, is_numbered
from adafactor.engine.torch.int8 import BLOCK
from adafactor.engine.torch.triton import table
from adafactor.engine.torch.triton.table import Launch
from adafactor.engine.torch.work import Work

_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16", torch.float64: "float64"}
_NAMES[torch.int8] = "int8"


def form_of(w: Work) -> Canonical | None:
    """The kernels' form of a tensor, or ``None`` where only ``eager.py`` can update it."""
    beside = [w.state[name] for name in ("momentum", "residual") if name in w.slots]
    dense = all(tensor.is_contiguous() for tensor in (w.param, *beside))
    if not dense or w.param.dtype == torch.float64:
        return None
    form = canonical(w.layout)
    if form is None or not isinstance(w.layout, Part):
        return form
    draws = w.settings.stochastic_rounding or any(tensor.dtype == torch.int8 for tensor in beside)
    if not w.layout.size or (draws and not is_numbered(in_memory(w.layout, form))):
        return None
    if not form.transposed or w.layout.cut == "nothing":
        return form
    # A part's rows are whole and its columns may not be: they are finished first, wherever they stand.
    return form._replace(columns_first=True) if w.layout.cut == "rows" and form.inner == 1 else None


def in_kernel(form: Canonical) -> Canonical:
    """The form with the rows that measure finishes as its rows."""
    return form._replace(rows=form.columns, columns=form.rows, transposed=False) if form.columns_first else form


def launch_of(w: Work, form: Canonical, grad: torch.dtype, aligned: bool, at_once: bool) -> Launch:
    """Which launch a tensor belongs to; ``at_once``: all verbs may be one."""
    settings, hp = w.settings, w.settings.hyperparameters
    momentum = w.state["momentum"] if hp.momentum is not None else None
    tensors = [w.param, *(w.state[name] for name in w.slots if name != "step")]
    aligned = aligned and all(tensor.data_ptr() % 16 == 0 for tensor in tensors)
    int8 = momentum is not None and momentum.dtype == torch.int8
    cut = w.layout.cut if isinstance(w.layout, Part) else None
    if cut is not None and (not form.factored or cut not in ("stack", "both")):
        cut = "rows"
    kernels = in_kernel(form)
    on_chip = table.on_chip(form, int8) if at_once and cut is None else None
    tile = table.tile_of(kernels, whole_rows=cut != "both", transposed=form.columns_first)
    return Launch(
        tile=on_chip or (tile if form.factored else None),
        param=_NAMES[w.param.dtype],
        grad=_NAMES[grad],
        momentum="" if momentum is None else _NAMES[momentum.dtype],
        scale=hp.scale_parameter,
        stochastic=settings.stochastic_rounding and w.param.dtype in (torch.bfloat16, torch.float16),
        compensated=w.compensated,
        huge=(form.size if cut is None else w.layout.slice_size * form.slices) > 1 << 31,
        aligned=aligned and form.columns % 16 == 0 and (not form.columns_first or form.rows % 16 == 0),
        flat=not form.factored or (int8 and on_chip is None and form.columns % BLOCK != 0),
        sliced=form.slices > 1,
        cut=cut,
        transposed=form.columns_first,
        on_chip=on_chip is not None,
    )
