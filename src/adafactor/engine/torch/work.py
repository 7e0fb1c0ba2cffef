"""What a front end hands to the engine: parameters with their state, by group, and what a backend makes of them.

A backend is made for a list of work on one device and has the four verbs of ``docs/algorithm.md``:

    measure    one read of the gradients, and of the parameters where the scale is asked for     eqs. 2, 4, 5, 6, 11
    reduce     add up over shards what measure left in its `Sums`: ``sharded/reducer.py``
    finish     numbers per column, matrix and slice                                              eqs. 3, 7, 9, 10
    apply      commit the statistics, move the parameters                                        eqs. 12, 13

and `step`, all of them at once, for where there is nothing to reduce. Nothing is written before apply, and no verb
asks the device for a value. ``eager.py`` serves any device, ``cpu.py`` and ``cuda.py`` one each.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Container, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from adafactor.core.factoring import Layout
from adafactor.core.hyperparameters import Hyperparameters

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
MOST_UPDATES = 2**53  # what float64 counts


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
        fused: the user's word on the backend; see ``choose.py``.
    """

    hyperparameters: Hyperparameters
    weight_decay: float = 0.0
    maximize: bool = False
    momentum_dtype: torch.dtype | None = None
    stochastic_rounding: bool = False
    skip_nonfinite: bool = False
    seed: int = 0
    scale_after_decay: bool = False
    scheduled: bool = False
    compensated: bool = False
    fused: bool | None = None

    @property
    def structure(self) -> tuple[object, ...]:
        """All that decides which state there is and which backend takes it; the rest may change from step to step."""
        momentum = self.hyperparameters.momentum is not None
        return momentum, momentum and self.momentum_dtype, self.compensated, self.stochastic_rounding, self.fused


@dataclass(slots=True, eq=False)
class Group:
    """A parameter group in the project's own words, as of this step.

    Attributes:
        settings: the group's.
        lr: its learning rate before eq. 8: a number, or a tensor of one element.
    """

    settings: Settings
    lr: float | Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Work:
    """One parameter, or the part of it that is here, and all that its update writes. Gradients are arguments.

    Attributes:
        param: of any strides, and of any of ``DTYPES``.
        state: tensors on the parameter's device, checked against the layout (``checks.py``):
            ``step``, int64 of shape (): the updates made so far (t is one more);
            ``row`` of ``layout.row_shape`` and ``column`` of ``layout.column_shape``, or ``second_moment`` of the
            parameter's shape, all contiguous and of ``math_dtype``;
            ``momentum`` of the parameter's shape, where ``settings`` ask for one; as int8 it is contiguous and
            has a ``momentum_scale``, float32, one for every 256 elements (``int8.py``);
            ``residual`` of the parameter's shape, bfloat16, where it is ``compensated``.
        layout: the role of every axis.
        group: the settings and the learning rate.
        rng_stream: the parameter's place among all the optimizer's parameters, which keys its random bits.
        diagnostics: where asked for, float64 (float32 where the device has no float64) of shape [slices, 4]; written:
            RMS(u) before clipping (eq. 7), what clipping divides by (eq. 10) and the parameter scale (eq. 9) of the
            last update made, and how many were left alone so far.
        name: what errors call it.
    """

    param: Tensor
    state: dict[str, Tensor]
    layout: Layout
    group: Group
    rng_stream: int
    diagnostics: Tensor | None = None
    name: str = ""

    @property
    def settings(self) -> Settings:
        return self.group.settings

    @property
    def slots(self) -> tuple[str, ...]:
        """The names of ``state`` that this update reads and writes."""
        return slots_of(self.layout, self.settings, self.param.dtype)

    @property
    def compensated(self) -> bool:
        """Whether rounding cuts something off that is kept: not of a float32 or float64 parameter."""
        return self.settings.compensated and is_half(self.param.dtype)


@dataclass(slots=True, eq=False)
class Sums:
    """What measure found of one tensor, each with the axes it was summed over as axes of length 1.

    What is written here is what finish reads: a reducer completes these tensors in place.

    Attributes:
        rows: the finished row statistic (eq. 2); of a part cut along both sides the sums of g², until `measure_again`.
        S, W: column sums of g² (eq. 4) and of g²/row (eq. 5). If unfactored, per slice: W is the sum of u² (eq. 11).
        Q: sum of x² per slice (eq. 6), where the parameter scale is asked for.
        columns, weighted: after `finish_columns` the sum of a matrix's finished columns, and of W / column.
        mu, u2: where other processes hold a part of it: the mean of the finished columns of every matrix, and the sum
            of u² of every slice (eq. 7).
        nonfinite: NaN where a gradient is not finite on another process. W is NaN too, unless this part is empty.
    """

    rows: Tensor | None
    S: Tensor | None
    W: Tensor
    Q: Tensor | None
    columns: Tensor | None = None
    weighted: Tensor | None = None
    mu: Tensor | None = None
    u2: Tensor | None = None
    nonfinite: Tensor | None = None


class Backend(Protocol):
    """A list of work, and what a way of running keeps for it from step to step."""

    work: Sequence[Work]

    def step(self, grads: Sequence[Tensor | None], skipped: Tensor) -> None:
        """One update of everything that has a gradient.

        ``skipped``, int64 of shape (), receives the number of tensors left alone because theirs is not finite.
        """

    def __init__(self, work: Sequence[Work]) -> None: ...

    def counts(self) -> bool:
        """Whether ``step`` is a number of updates everywhere; True where the device would have to be waited for."""

    def measure(self, grads: Sequence[Tensor]) -> Sequence[Sums]: ...

    def measure_again(self) -> None:
        """The second read of parts that are cut along both sides, whose row sums are complete now."""

    def finish_columns(self, places: Sequence[int]) -> None:
        """Finish the columns (eq. 3) of some of the work, and what they add to the sum of u² (eq. 7)."""

    def finish(self) -> None: ...

    def apply(self, skipped: Tensor, absent: Container[int] = ()) -> None:
        """Write; what is ``absent`` has no gradient anywhere and is left out."""

    def release(self) -> None:
        """Let go of the gradients."""


def slots_of(layout: Layout, settings: Settings, dtype: torch.dtype) -> tuple[str, ...]:
    """The names of the state of a parameter of a dtype."""
    momentum: tuple[str, ...] = ()
    if settings.hyperparameters.momentum is not None:
        momentum = ("momentum", "momentum_scale") if settings.momentum_dtype == torch.int8 else ("momentum",)
    residual = ("residual",) if settings.compensated and is_half(dtype) else ()
    return ("step", *layout.slots, *momentum, *residual)


def slot_dtype(slot: str, settings: Settings, dtype: torch.dtype) -> torch.dtype:
    """How a slot of the state of a parameter of a dtype is stored."""
    if slot == "momentum":
        return settings.momentum_dtype or math_dtype(dtype)
    stored = {"step": torch.int64, "residual": torch.bfloat16, "momentum_scale": torch.float32}
    return stored.get(slot, math_dtype(dtype))


def new_diagnostics(layout: Layout, device: torch.device) -> Tensor:
    """Zeros for ``Work.diagnostics``."""
    slices = math.prod(layout.shape[axis] for axis in layout.batch)
    return torch.zeros(slices, 4, dtype=torch.float32 if device.type == "mps" else torch.float64, device=device)


def math_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of statistics and arithmetic: float64 for float64 parameters, float32 for all others."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def is_half(dtype: torch.dtype) -> bool:
    """Whether a parameter of it is rounded from the arithmetic's float32."""
    return dtype in (torch.bfloat16, torch.float16)


def is_sharded(param: Tensor) -> bool:
    """Whether it is a DTensor. Not imported here: whoever has one has imported it."""
    sharded = sys.modules.get("torch.distributed.tensor")
    return sharded is not None and isinstance(param, sharded.DTensor)


def local_of(tensor: Any) -> Any:
    """What is here of a DTensor; anything else as it is."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def whole_of(tensor: Any) -> Any:
    """A DTensor put together, for which all its ranks call; anything else as it is."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor
