"""Clipping by the norm of gradients that are not kept, as ``torch.nn.utils.clip_grad_norm_`` clips those that are."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, get_args

import torch
from torch import Tensor

from adafactor.core.errors import message
from adafactor.core.hyperparameters import in_range
from adafactor.engine.torch.work import is_sharded, local_of, whole_of
from adafactor.torch.members import Place

Clip = Literal["global", "tensor"]


class Clipping:
    """What gradients are multiplied by.

    Attributes:
        max_norm: their largest norm; ``None`` leaves them alone.
        of_all: whether that is the norm of all of them together.
        total: the latest norm of all of them, before clipping, of shape ().
    """

    def __init__(self, max_norm: float | None, clip: Clip) -> None:
        self.max_norm, self.of_all = max_norm, max_norm is not None and clip == "global"
        self.total: Tensor | None = None
        self._norms: dict[Place, Tensor] = {}
        self._factor: Tensor | None = None

    def start(self) -> Clipping:
        """Forget the norms."""
        self._norms.clear()
        return self

    def measure(self, place: Place, param: Tensor) -> None:
        """Note the norm of a parameter's gradient."""
        self._norms[place] = _norm(param)

    @contextmanager
    def scaling(self) -> Iterator[None]:
        """A block in which gradients are scaled by the norm of all measured ones, the same on all ranks."""
        if self._norms:
            alike: dict[object, list[Tensor]] = {}
            for place in sorted(self._norms):
                norm = self._norms[place]
                key = (norm.device_mesh, norm.placements) if is_sharded(norm) else norm.device  # type: ignore[attr-defined]
                alike.setdefault(key, []).append(norm)
            parts = [whole_of(torch.linalg.vector_norm(torch.stack(norms))) for norms in alike.values()]
            self.total = torch.linalg.vector_norm(torch.stack([part.to(parts[0].device) for part in parts]))
            self._factor = self._factor_of(self.total)
        try:
            yield
        finally:
            self._factor = None

    def apply(self, param: Tensor) -> None:
        """Scale a parameter's gradient."""
        if self.max_norm is None or param.grad is None:
            return
        factor = self._factor if self.of_all else self._factor_of(whole_of(_norm(param)))
        if factor is not None:
            grad: Tensor = local_of(param.grad)
            grad.mul_(factor.to(grad.device))

    def _factor_of(self, norm: Tensor) -> Tensor:
        assert self.max_norm is not None
        return (self.max_norm / (norm + 1e-6)).clamp(max=1.0)


def _norm(param: Tensor) -> Tensor:
    assert param.grad is not None
    dtype = torch.promote_types(param.grad.dtype, torch.float32)
    norm: Tensor = torch.linalg.vector_norm(param.grad, dtype=dtype)
    return norm


def clip_of(max_norm: float | None, clip: Clip) -> Clipping:
    """Raises ValueError: one of them is out of range."""
    if max_norm is not None and not in_range(max_norm, 0.0, math.inf):
        raise ValueError(message("max_norm", ">= 0 and finite, or None", max_norm, "None does not clip."))
    if clip not in get_args(Clip):
        raise ValueError(message("clip", '"global" or "tensor"', clip, "It says whose norm max_norm is."))
    return Clipping(max_norm, clip)


__all__ = ["Clip", "Clipping", "clip_of"]
