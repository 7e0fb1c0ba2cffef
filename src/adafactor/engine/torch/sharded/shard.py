"""One process's part of one DTensor parameter, as work for a backend."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.tensor import DTensor

from adafactor.core.errors import message
from adafactor.core.factoring import Layout
from adafactor.engine.torch.checks import (
    AFRESH,
    check_complete,
    check_float_momentum,
    check_memory,
    check_param,
    fitted,
)
from adafactor.engine.torch.sharded.dtensor import adopt, placement_of, placements_of, statistic
from adafactor.engine.torch.sharded.placement import Placement
from adafactor.engine.torch.work import Work, slot_dtype


@dataclass(frozen=True, slots=True, eq=False)
class Shard:
    """This process's part of one parameter.

    Attributes:
        param: the parameter.
        work: of the local tensors; rows and columns have changed places where ``placement.transposed``.
        placement: where the part lies.
        state: what the optimizer keeps, as soon as a step was made with it.
    """

    param: DTensor
    work: Work
    placement: Placement
    state: dict[str, Any]

    def current(self, state: Mapping[str, Any]) -> bool:
        """Whether the parameter's and its state's local tensors are still these."""
        if not _same(self.param.to_local(), self.work.param):
            return False
        if not state:  # it was never stepped
            return True
        renamed = _renamed(self.placement)
        for slot, value in self.state.items():
            now = state.get(slot)
            if now is not value or not _same(_local(now), self.work.state[renamed.get(slot, slot)]):
                return False
        return True


def shard_of(
    param: DTensor,
    draft: Work,
    state: Mapping[str, Any],
    diagnostics_of: Callable[[Tensor, Layout], Tensor | None],
) -> Shard:
    """This process's part of a parameter, with zeros for the state that it has not yet. Nothing is written.

    Args:
        draft: all that is said of the whole parameter.
        state: what the optimizer keeps of it.
        diagnostics_of: gives the tensor for diagnostics of the part.

    Raises:
        RuntimeError: the placements do not fit (`dtensor.placement_of`), or the state does not.
    """
    placement = placement_of(param, draft.layout)
    local = param.to_local()
    check_param(local, draft.name)
    check_float_momentum("a DTensor", draft.settings)
    check_complete(draft.layout, state, draft.name)
    held = {slot: _fitted(param, placement, draft, slot, state.get(slot)) for slot in draft.slots}
    renamed = _renamed(placement)
    locals_ = {renamed.get(slot, slot): _local(value) for slot, value in held.items()}
    layout = placement.local
    work = replace(draft, param=local, state=locals_, layout=layout, diagnostics=diagnostics_of(param, layout))
    return Shard(param, work, placement, held)


def _same(now: Tensor, then: Tensor) -> bool:
    """Whether two local tensors are the same memory: a DTensor gives another view of it at every question."""
    return now is then or (
        now.data_ptr() == then.data_ptr() and now.dtype == then.dtype and now.shape == then.shape
        and now.stride() == then.stride()
    )  # fmt: skip


def _renamed(placement: Placement) -> dict[str, str]:
    return {"row": "column", "column": "row"} if placement.transposed else {}


def _local(value: Any) -> Any:
    return value.to_local() if isinstance(value, DTensor) else value


def _fitted(param: DTensor, placement: Placement, draft: Work, slot: str, value: Any) -> Tensor:
    """A state tensor as the parameter needs it: the one that is there where it fits, else a copy, or zeros."""
    layout, part, device = placement.layout, placement.part, param.to_local().device
    what = f"{slot} in the state of {draft.name}"
    dtype = slot_dtype(slot, draft.settings, param.dtype)
    if slot == "step":
        return fitted(_local(value), slot, param.to_local(), ((), dtype), draft.name)
    axes = layout.keeps(slot)
    shape, local_shape = tuple(layout.shape[axis] for axis in axes), tuple(part.shape[axis] for axis in axes)
    if value is None:
        return statistic(torch.zeros(local_shape, dtype=dtype, device=device), param, shape, axes)
    if not isinstance(value, Tensor) or tuple(value.shape) != shape or value.device.type == "meta":
        remedy = f"{AFRESH}, or construct the optimizer with the factoring that wrote it."
        got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise RuntimeError(message(what, f"of shape {shape} for {tuple(param.shape)}", got, remedy))
    check_memory(what, _local(value))
    if isinstance(value, DTensor) and value.device_mesh == param.device_mesh:
        local = value.to_local()
        if (
            value.placements == tuple(placements_of(param, axes))
            and tuple(local.shape) == local_shape
            and (local.dtype, local.device) == (dtype, device)
            and local.is_contiguous()
        ):
            return value
    return adopt(value, param, layout, slot, dtype)


def gradient(param: DTensor, name: str) -> Tensor | None:
    """The local part of the parameter's gradient.

    Raises:
        RuntimeError: it is not sharded over the parameter's mesh, so its parts have no meaning here.
    """
    grad = param.grad
    if grad is None:
        return None
    if not isinstance(grad, DTensor) or grad.device_mesh != param.device_mesh:
        remedy = "Let autograd make it, or use distribute_tensor with the parameter's mesh."
        got = type(grad).__name__
        raise RuntimeError(message(f"the gradient of {name}", "a DTensor on the parameter's mesh", got, remedy))
    if grad.placements != param.placements:  # tensor parallelism leaves a sum to be done
        grad = grad.redistribute(placements=param.placements)
    local = grad.to_local()
    return local.wait() if isinstance(local, AsyncCollectiveTensor) else local


def absent(param: Tensor) -> Tensor:
    """A gradient for a part that has none while other processes may: one zero that stands for all."""
    return torch.zeros((), dtype=param.dtype, device=param.device).expand(param.shape)
