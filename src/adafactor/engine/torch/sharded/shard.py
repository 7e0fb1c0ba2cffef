"""One process's part of one DTensor parameter, as work for a kernel."""

from __future__ import annotations

from collections.abc import MutableMapping
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.tensor import DTensor

from adafactor.core.errors import message
from adafactor.core.factoring import Layout
from adafactor.engine.torch import eager
from adafactor.engine.torch.sharded.dtensor import placement_of, statistic
from adafactor.engine.torch.sharded.placement import Placement
from adafactor.engine.torch.work import Settings, Work, math_dtype


@dataclass(slots=True, eq=False)
class Shard:
    """This process's part of one parameter.

    Attributes:
        param: the parameter.
        work: of the local tensors; rows and columns have changed places where ``placement.transposed``.
        placement: where the part lies.
        name: what errors and the comparison of ranks call it.
        fused: whether native kernels may step it.
        present: whether there is a gradient here; elsewhere there may be one.
        decay: 1 - beta(t) of this step, and ``found``: its sums.
        state: the optimizer's own, by parameter; ``made``: what it holds of this one after this step.
    """

    param: DTensor
    work: Work
    placement: Placement
    name: str
    fused: bool
    present: bool = True
    decay: Tensor | None = None
    found: eager.Sums | None = None
    state: MutableMapping[Tensor, dict[str, Tensor]] = field(default_factory=dict)
    made: dict[str, Tensor] = field(default_factory=dict)

    @property
    def sums(self) -> eager.Sums:
        assert self.found is not None
        return self.found

    def open(self, grad: DTensor | None, state: MutableMapping[Tensor, dict[str, Tensor]]) -> None:
        """Point ``work`` at the local parts of this step's tensors, made of zeros where there are none yet."""
        w, param = self.work, self.param
        w.param = param.to_local()
        self.state, self.present = state, grad is not None
        old = state.get(param, {})
        if grad is None:  # no memory: one zero that stands for all
            w.grad = torch.zeros((), dtype=w.param.dtype, device=w.param.device).expand(w.param.shape)
        else:
            if grad.placements != param.placements:  # tensor parallelism leaves a sum to be done
                grad = grad.redistribute(placements=param.placements)
            w.grad = grad.to_local()
            if isinstance(w.grad, AsyncCollectiveTensor):
                w.grad = w.grad.wait()
        other = {"row": "column", "column": "row"} if self.placement.transposed else {}
        made = {slot: old[slot] if slot in old else self._zeros(slot) for slot in w.slots}
        self.made = made
        w.state = {
            other.get(slot, slot): value.to_local() if isinstance(value, DTensor) else value
            for slot, value in made.items()
        }

    def _zeros(self, slot: str) -> Tensor:
        w, roles, part = self.work, self.placement.roles, self.placement.part
        device = w.param.device
        if slot == "step":
            return torch.zeros((), dtype=torch.int64, device=device)
        dtype = math_dtype(w.param.dtype)
        if slot == "momentum":
            dtype = w.settings.momentum_dtype or dtype
        elif slot == "residual":
            dtype = torch.bfloat16
        axes = roles.keeps(slot)
        local = torch.zeros([part.shape[axis] for axis in axes], dtype=dtype, device=device)
        return statistic(local, self.param, tuple(roles.shape[axis] for axis in axes), axes)

    def commit(self) -> None:
        """Keep the state that this step has written, and let go of the gradient."""
        self.state[self.param].update(self.made)
        del self.work.grad


def shard_of(param: DTensor, roles: Layout, settings: Settings, lr: float | Tensor, tensor: int, name: str) -> Shard:
    """This process's part of a parameter. Nothing of it is read yet.

    Raises:
        RuntimeError: the placements do not fit; see `dtensor.placement_of`.
    """
    place = placement_of(param, roles)
    part = place.part.transposed if place.transposed else place.part
    local = param.to_local()
    return Shard(param, Work(local, local, {}, part, settings, lr, tensor, eager.step), place, name, fused=True)


def gradient(param: DTensor) -> DTensor | None:
    """The parameter's gradient.

    Raises:
        RuntimeError: it is not sharded over the parameter's mesh, so its parts have no meaning here.
    """
    grad = param.grad
    if grad is not None and (not isinstance(grad, DTensor) or grad.device_mesh != param.device_mesh):
        remedy = "Let autograd make it, or use distribute_tensor with the parameter's mesh."
        got = type(grad).__name__
        raise RuntimeError(message("a sharded parameter's gradient", "a DTensor on the parameter's mesh", got, remedy))
    return grad
