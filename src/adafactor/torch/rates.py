"""The learning rate that a parameter really gets: eqs. 8 and 9, in operations that wait for no device."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from adafactor.core.factoring import layout
from adafactor.engine.torch.work import is_sharded, math_dtype
from adafactor.torch.arguments import translate


@torch.no_grad()
def step_size(param: Tensor, name: str, group: Mapping[str, Any], step: Tensor | int) -> Tensor:
    """alpha of update ``step`` at the weights that are there (eqs. 8 and 9).

    Args:
        name: the parameter's, which a callable ``factoring`` is asked with.
        group: its group in the optimizer's words.

    Returns:
        On the parameter's device, of shape (), or one number per slice of the batch axes. Of a sharded parameter
        the whole one's, so that all its ranks must call.
    """
    hyperparameters = translate(group).hyperparameters
    alpha = rho(param, hyperparameters.relative_step, group["lr"], step)
    if not hyperparameters.scale_parameter:
        return alpha
    batch = layout(param.shape, group["factoring"], group["min_dim_size_to_factor"], name=name).batch
    axes = [axis for axis in range(param.dim()) if axis not in batch]
    norm: Tensor = torch.linalg.vector_norm(param, dim=axes or None, dtype=alpha.dtype)
    whole: Tensor = norm.full_tensor() if is_sharded(norm) else norm  # type: ignore[attr-defined]
    rms = whole / math.sqrt(max(1, math.prod(param.shape[axis] for axis in axes)))
    return (alpha * rms.clamp_(min=hyperparameters.epsilon_2)).reshape(-1 if batch else ())


def rho(param: Tensor, capped: object, lr: Any, step: Tensor | int) -> Tensor:
    """The relative step size of update ``step`` (eq. 8), of shape ()."""
    dtype, device = math_dtype(param.dtype), param.device

    def number(value: Any) -> Tensor:
        if isinstance(value, Tensor):
            return value.detach().reshape(()).to(device, dtype)
        return torch.full((), float(value), dtype=dtype, device=device)

    return torch.minimum(number(lr), number(step).rsqrt()) if capped else number(lr)


def logged(values: Mapping[str, Tensor], tensors: bool) -> dict[str, float]:
    """Step sizes as a host's logger takes them: the least, the median and the largest, or every tensor's.

    Args:
        values: what ``effective_lr()`` gave, of slices the largest counts. Reading them waits for the device, once.
        tensors: of each tensor, by its name.
    """
    if not values:
        return {}
    first = next(iter(values.values())).device
    largest = torch.stack([value.max().to(first, torch.float32) for value in values.values()]).cpu()
    if tensors:
        return {f"effective_lr/{name}": float(value) for name, value in zip(values, largest, strict=True)}
    found = {"min": largest.min(), "median": largest.median(), "max": largest.max()}
    return {f"effective_lr/{name}": float(value) for name, value in found.items()}
