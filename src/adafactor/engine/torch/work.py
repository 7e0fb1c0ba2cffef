"""What the PyTorch front end hands to a kernel: one item of work per tensor and step.

A kernel is a function ``step(work, skipped)``. It makes one update of every parameter in the list, all of them
on one device, and in the items' ``state`` in place, without asking the device for a value. `eager.py` is
the kernel for any device; a native one takes the same list.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from adafactor.core.factoring import Layout
from adafactor.core.hyperparameters import Hyperparameters

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


Kernel = Callable[[Sequence["Work"], Tensor], None]


@dataclass(frozen=True, slots=True)
class Settings:
    """What a parameter group says besides its learning rate, which a scheduler moves.

    Attributes:
        hyperparameters: the numbers of the algorithm, in the project's own names.
        weight_decay: x is multiplied by 1 - lr * weight_decay before the update, after RMS(x) has been taken.
        maximize: follow the gradient instead of descending.
        momentum_dtype: how momentum is stored, ``torch.int8`` as ``int8.py`` says; ``None`` as the statistics are.
        stochastic_rounding: round a bfloat16 or float16 parameter up or down at random, without bias.
        skip_nonfinite: leave a tensor alone, parameter and state, when its gradient is not finite.
        seed: of the random bits behind stochastic rounding.
        scale_after_decay: take RMS(x) after weight decay instead, as Keras does.
        scheduled: the learning rate varies by itself, which ``relative_step=True`` leaves alone (eq. 8).
        compensated: keep what rounding cuts off a bfloat16 or float16 parameter, and add it again in the next update.
    """

    hyperparameters: Hyperparameters
    weight_decay: float
    maximize: bool
    momentum_dtype: torch.dtype | None
    stochastic_rounding: bool
    skip_nonfinite: bool
    seed: int
    scale_after_decay: bool = False
    scheduled: bool = False
    compensated: bool = False


@dataclass(slots=True, eq=False)
class Work:
    """One parameter, all that its update reads, and all that it writes.

    Attributes:
        param: the parameter, of any strides; written.
        grad: its gradient, of the same shape and device, of any of ``DTYPES``; never written.
        state: the optimizer's own dictionary for this parameter; its tensors are written in place:
            ``step``, int64 of shape (): the updates made so far, before this one (t is one more);
            ``row`` of ``layout.row_shape`` and ``column`` of ``layout.column_shape``, or ``second_moment`` of the
            parameter's shape, all contiguous and of ``math_dtype``;
            ``momentum`` of the parameter's shape, where ``settings`` ask for one; as int8 it is contiguous and
            has a ``momentum_scale``, float32, one for every 256 elements (``int8.py``);
            ``residual`` of the parameter's shape, bfloat16, where it is ``compensated``.
        layout: the role of every axis.
        settings: the group's.
        lr: the group's learning rate before eq. 8: a number, or a tensor of one element.
        tensor: the parameter's place among all the optimizer's parameters, which keys its random bits.
        kernel: what updates it.
        report: where asked for, float64 (float32 where the device has no float64) of shape [slices, 4]; written:
            RMS(u) before clipping (eq. 7), what clipping divides by (eq. 10) and the parameter scale (eq. 9) of the
            last update made, and how many were left alone so far.
    """

    param: Tensor
    grad: Tensor
    state: dict[str, Tensor]
    layout: Layout
    settings: Settings
    lr: float | Tensor
    tensor: int
    kernel: Kernel
    report: Tensor | None = None

    @property
    def slots(self) -> tuple[str, ...]:
        """The names of ``state`` that this update reads and writes."""
        momentum: tuple[str, ...] = ()
        if self.settings.hyperparameters.momentum is not None:
            coded = self.settings.momentum_dtype == torch.int8
            momentum = ("momentum", "momentum_scale") if coded else ("momentum",)
        residual = ("residual",) if self.compensated else ()
        return ("step", *self.layout.slots, *momentum, *residual)

    @property
    def compensated(self) -> bool:
        """Whether rounding cuts something off that is kept: not of a float32 or float64 parameter."""
        return self.settings.compensated and self.param.dtype in (torch.bfloat16, torch.float16)


def new_report(layout: Layout, device: torch.device) -> Tensor:
    """Zeros for ``Work.report``."""
    slices = math.prod(layout.shape[axis] for axis in layout.batch)
    return torch.zeros(slices, 4, dtype=torch.float32 if device.type == "mps" else torch.float64, device=device)


def math_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of statistics and arithmetic: float64 for float64 parameters, float32 for all others."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def is_sharded(param: Tensor) -> bool:
    """Whether it is a DTensor. Not imported here: whoever has one has imported it."""
    sharded = sys.modules.get("torch.distributed.tensor")
    return sharded is not None and isinstance(param, sharded.DTensor)
