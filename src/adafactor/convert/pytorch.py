"""Optimizer checkpoints of the PyTorch world: our own, ``torch.optim.Adafactor``'s and transformers' ``Adafactor``'s.

All three keep the same numbers under different names:

    ours            torch.optim.Adafactor   transformers        shape, of a parameter (..., n, m)
    row             row_var                 exp_avg_sq_row      (..., n); torch.optim keeps (..., n, 1)
    column          col_var                 exp_avg_sq_col      (..., m); torch.optim keeps (..., 1, m)
    second_moment   variance                exp_avg_sq          the parameter's
    momentum        -                       exp_avg / alpha     the parameter's
    residual        -                       -                   the parameter's
    momentum_scale  -                       -                   (blocks of 256 elements,), with 8-bit momentum
    step            step, float32           step, int           ()

transformers averages updates that the step size alpha has already multiplied. Divided by the last alpha, its average
is our momentum exactly while alpha was constant, and approximately otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from adafactor.core.factoring import layout
from adafactor.engine.torch import int8
from adafactor.engine.torch.work import is_sharded, math_dtype

Group = dict[str, Any]
State = dict[str, Any]
Notes = dict[str, None]  # sentences, each once, in order

NAMES = {
    **{"row_var": "row", "col_var": "column", "variance": "second_moment"},
    **{"exp_avg_sq_row": "row", "exp_avg_sq_col": "column", "exp_avg_sq": "second_moment", "exp_avg": "momentum"},
}
# torch.optim.Adafactor has no word for these and always does what they say.
TORCH = {"relative_step": True, "scale_parameter": True, "beta1": None, "beta2_max": None}
# transformers' own names, and what it always does.
TRANSFORMERS = {"clip_threshold": "d", "decay_rate": "beta2_decay"}
TRANSFORMERS_ALWAYS = {"beta2_max": None, "maximize": False}


@dataclass(frozen=True, slots=True, eq=False)
class Held:
    """A tensor that torch's load_state_dict cannot see, or it would cast it to the parameter's dtype."""

    tensor: Tensor


def read(state_dict: Mapping[str, Any], groups: Sequence[Group], notes: Notes) -> dict[str, Any]:
    """A ``state_dict`` in our words, its tensors copied to where the parameters are, and ``Held``.

    Args:
        state_dict: of any of the three optimizers; not modified.
        groups: the groups of the optimizer that loads it, for parameters and for arguments the file has not.
        notes: receives one sentence for everything that cannot carry over as it was.

    Raises:
        ValueError: a statistic does not have the shape the parameter's layout asks for.
    """
    saved = state_dict["param_groups"]
    if [len(group["params"]) for group in saved] != [len(group["params"]) for group in groups]:
        return dict(state_dict)  # torch has a sentence for that
    state = dict(state_dict["state"])
    read_groups = []
    for old, group in zip(saved, groups, strict=True):
        new = {**{name: value for name, value in group.items() if name != "params"}, **_group(old, notes)}
        read_groups.append(new)
        names = new.get("param_names") or [f"parameter {key}" for key in old["params"]]
        for key, param, name in zip(old["params"], group["params"], names, strict=True):
            if key in state:
                state[key] = _state(state[key], old, new, param, name, notes)
    return {**state_dict, "state": state, "param_groups": read_groups}


def _group(old: Group, notes: Notes) -> Group:
    """A group's arguments in our words; what the file does not know is left out."""
    if "decay_rate" in old and "clip_threshold" in old:
        return _transformers_group(old, notes)
    if "beta2_decay" in old and "relative_step" not in old:
        if old["eps"][0]:
            notes.setdefault(
                f"torch.optim.Adafactor used eps[0]={old['eps'][0]} as a floor under the second moment; "
                "here it is added to g², which differs wherever g² is not much larger."
            )
        return {**old, **TORCH}
    return dict(old)


def _transformers_group(old: Group, notes: Notes) -> Group:
    new = {TRANSFORMERS.get(name, name): value for name, value in old.items() if name != "warmup_init"}
    new.update(TRANSFORMERS_ALWAYS)
    if old["relative_step"]:
        new["lr"] = 1e-2
    if old.get("warmup_init"):
        notes.setdefault(
            "transformers' warmup_init does not carry over: add the scheduler of docs/torch.md, or lr stays at 1e-2."
        )
    if old["weight_decay"] and (old["relative_step"] or old["scale_parameter"]):
        notes.setdefault(
            "transformers multiplied weight_decay by the step size and the parameter's scale, here lr alone "
            "multiplies it: choose weight_decay anew."
        )
    return new


def _state(saved: State, old: Group, group: Group, param: Tensor, name: str, notes: Notes) -> State:
    """One parameter's state in our words."""
    values = {NAMES.get(key, key): value for key, value in saved.items() if key != "RMS"}
    if "exp_avg" in saved:
        values["momentum"] = _momentum(saved, old, notes)
    roles = layout(param.shape, group["factoring"], group["min_dim_size_to_factor"], name=name)
    dtype = math_dtype(param.dtype)
    wanted = {**roles.slots, "momentum": tuple(param.shape), "residual": tuple(param.shape)}
    dtypes = {"momentum": group["momentum_dtype"] or dtype, "residual": torch.bfloat16}
    coded = group["momentum_dtype"] == torch.int8 and not is_sharded(param)
    if "momentum_scale" in values or (coded and "momentum" in values):
        wanted["momentum_scale"] = (int8.scales(param.numel()),)
        _recode(values, coded)
    read: State = {}
    for key, value in values.items():
        if isinstance(value, Tensor) and is_sharded(value) and not is_sharded(param):
            value = value.full_tensor()  # type: ignore[attr-defined]
        if key == "step":
            step = torch.as_tensor(value).to(param.device, torch.int64, copy=True)
            read[key] = Held(step.reshape(()))
        elif not isinstance(value, Tensor):
            read[key] = value
        elif key in wanted and is_sharded(param) and value.numel() == math.prod(wanted[key]):
            from adafactor.engine.torch.sharded.dtensor import adopt

            read[key] = Held(adopt(value, param, roles, key, dtypes.get(key, dtype)))  # type: ignore[arg-type]
        elif key not in wanted or value.numel() != math.prod(wanted[key]):
            needs = " and ".join(f"{slot} {shape}" for slot, shape in roles.slots.items())
            raise ValueError(
                f"{name} of shape {tuple(param.shape)} needs the statistics {needs}, got {key} of shape "
                f"{tuple(value.shape)}. Construct the optimizer with the checkpoint's factoring."
            )
        elif key in dtypes:
            memory = torch.contiguous_format if dtypes[key] == torch.int8 else torch.preserve_format
            stored = torch.empty_like(param, dtype=dtypes[key], memory_format=memory)
            read[key] = Held(stored.copy_(value))
        elif key == "momentum_scale":
            read[key] = Held(value.to(param.device, torch.float32, copy=True).reshape(wanted[key]))
        else:
            copied = value.reshape(wanted[key]).to(param.device, dtype, copy=True)
            read[key] = Held(copied.contiguous())
    return read


def _recode(values: State, coded: bool) -> None:
    """Turn 8-bit momentum into numbers and back, where the file has the one and the group asks for the other."""
    momentum: Tensor = values["momentum"]
    scale: Tensor | None = values.pop("momentum_scale", None)
    if scale is not None and not coded:
        values["momentum"] = int8.decode(momentum, scale)
    elif scale is None:
        values["momentum"], values["momentum_scale"] = int8.encode(momentum.to(torch.float32))
    else:
        values["momentum_scale"] = scale


def _momentum(saved: State, old: Group, notes: Notes) -> Tensor:
    """transformers' average of alpha times û, divided by the last alpha."""
    alpha = old["lr"]
    if old["relative_step"]:
        t = int(saved["step"])
        alpha = min(1e-6 * t if old.get("warmup_init") else 1e-2, 1.0 / math.sqrt(t))
    if old["scale_parameter"]:
        alpha = alpha * max(old["eps"][1], float(saved["RMS"]))
    if old["relative_step"] or old["scale_parameter"]:
        notes.setdefault(
            "transformers' momentum holds past step sizes, which were not constant: divided by the last one, it "
            "carries over approximately."
        )
    average: Tensor = saved["exp_avg"].to(torch.float32)
    return average / alpha if alpha else torch.zeros_like(average)
