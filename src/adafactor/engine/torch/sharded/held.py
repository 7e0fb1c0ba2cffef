"""What this process holds of a parameter, as work for backends: one part of a DTensor, a few of a flat parameter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from adafactor.core.placement import Placement
from adafactor.engine.torch.work import Work, local_of


@dataclass(frozen=True, slots=True, eq=False)
class Held:
    """One tensor of which this process holds parts.

    Attributes:
        placement: where they lie.
        works: of every part, with the tensor's rows and columns in each other's place where ``placement.transposed``.
        told: what ranks must agree on, besides the settings.
    """

    placement: Placement
    works: Sequence[Work]
    told: str


@dataclass(frozen=True, slots=True, eq=False)
class Sharded:
    """What this process holds of one parameter.

    Attributes:
        draft: the parameter as its optimizer has it, and what is said of it.
        param, state: the memory of it that is here, and of what is written beside it.
        kept: the same state as the optimizer keeps it, as soon as a step was made.
        tensors: of a DTensor one, of a flat parameter those that were flattened into it.
        mesh: the DTensor's, some of whose dimensions split it.
        group: who holds the rest of a flat parameter, if anybody; ``begins``: where in it the parts begin.
    """

    draft: Work
    param: Tensor
    state: Mapping[str, Tensor]
    kept: dict[str, Tensor]
    tensors: Sequence[Held]
    mesh: DeviceMesh | None = None
    group: dist.ProcessGroup | None = None
    begins: Sequence[int] = ()

    @property
    def slots(self) -> Sequence[str]:
        return tuple(self.state)

    @property
    def works(self) -> list[Work]:
        return [w for held in self.tensors for w in held.works]

    @property
    def summed(self) -> tuple[bool, bool]:
        """What decides what ranks add up, and may change from step to step."""
        settings = self.draft.settings
        return settings.hyperparameters.scale_parameter, settings.skip_nonfinite

    @property
    def is_split(self) -> bool:
        """Whether other processes may have gradients of it."""
        return self.mesh is None or bool(self.tensors[0].placement.dims)

    def current(self, kept: Mapping[str, Any]) -> bool:
        """Whether the parameter's memory and what the optimizer keeps of it are still these."""
        if not _same(local_of(self.draft.param), self.param):
            return False
        return not kept or all(
            kept.get(slot) is tensor and _same(local_of(tensor), self.state[slot]) for slot, tensor in self.kept.items()
        )

    def cut(self, grad: Tensor | None) -> list[Tensor]:
        """The gradient of every part: of one that others may have, one zero that stands for all."""
        if grad is None:
            grad = torch.zeros((), dtype=self.param.dtype, device=self.param.device).expand(self.param.shape)
        if self.mesh is not None:
            return [grad]
        places = zip(self.works, self.begins, strict=True)
        return [grad[begin : begin + w.layout.size].view(w.layout.shape) for w, begin in places]


def _same(now: Tensor, then: Tensor) -> bool:
    """Whether two local tensors are the same memory: a DTensor gives another view of it at every question."""
    return now is then or (
        now.data_ptr() == then.data_ptr() and now.dtype == then.dtype and now.shape == then.shape
        and now.stride() == then.stride()
    )  # fmt: skip
