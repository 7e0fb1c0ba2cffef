"""What an optimizer tells of its updates: their diagnostics, and the step sizes that parameters really get.

In operations that wait for no device.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from adafactor.core.errors import message
from adafactor.engine.torch.sharded import spans_of
from adafactor.engine.torch.work import math_dtype, whole_of
from adafactor.torch.arguments import layout_of, translate

COLUMNS = ("update_rms", "clip_factor", "parameter_scale", "skipped")  # of ``Work.diagnostics``

Words = Mapping[str, Any]  # a group
State = Mapping[Tensor, Any]


def named(groups: Sequence[Words]) -> Iterator[tuple[str, int, Tensor]]:
    """Every parameter by its name, with its group's number."""
    first = 0
    for number, group in enumerate(groups):
        names = group.get("param_names") or range(first, first + len(group["params"]))
        first += len(group["params"])
        for name, param in zip(names, group["params"], strict=True):
            yield str(name), number, param


def diagnostics(
    groups: Sequence[Words], state: State, recorded: Mapping[Tensor, Tensor] | None, lrs: Mapping[int, Any]
) -> dict[str, dict[str, Tensor]]:
    """What `Adafactor.diagnostics` gives; ``lrs``: the learning rates of groups' last updates."""
    if recorded is None:
        raise RuntimeError(message("diagnostics", "True to have any", False, "Pass it to the constructor."))
    given = {}
    for name, number, param in named(groups):
        if param in recorded:
            of = recorded[param].clone()
            values = dict(zip(COLUMNS, (of[0] if of.shape[0] == 1 else of).unbind(-1), strict=True))
            step, group = state.get(param, {}).get("step", 1), groups[number]
            rate = rho(param, group["relative_step"], lrs.get(number, group["lr"]), step)
            given[name] = {**values, "effective_lr": rate * values["parameter_scale"]}
    return given


def effective_lr(groups: Sequence[Words], state: State) -> dict[str, Tensor]:
    """What `Adafactor.effective_lr` gives."""
    if any(spans_of(param) is not None for _, _, param in named(groups)):
        remedy = "diagnostics() has that of the last update of a parameter that holds one tensor."
        raise RuntimeError(message("effective_lr", "asked of whole tensors or DTensors", "flat shards", remedy))
    return {
        name: step_size(param, name, groups[number], state.get(param, {}).get("step", 0) + 1)
        for name, number, param in named(groups)
        if param.numel()
    }


@torch.no_grad()
def step_size(param: Tensor, name: str, group: Words, step: Tensor | int) -> Tensor:
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
    batch = layout_of(group, tuple(param.shape), name).batch
    axes = [axis for axis in range(param.dim()) if axis not in batch]
    norm: Tensor = torch.linalg.vector_norm(param, dim=axes or None, dtype=alpha.dtype)
    rms: Tensor = whole_of(norm) / math.sqrt(max(1, math.prod(param.shape[axis] for axis in axes)))
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
    summary = {"min": largest.min(), "median": largest.median(), "max": largest.max()}
    return {f"effective_lr/{name}": float(value) for name, value in summary.items()}
