"""What a user says to the PyTorch front end: translated into the project's own words, or refused.

Every refusal comes before the first tensor is written.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from adafactor.core.errors import message
from adafactor.core.factoring import validate
from adafactor.core.hyperparameters import Hyperparameters, in_range
from adafactor.engine.torch.work import DTYPES, Settings

# What a user of this module calls the hyperparameters.
VOCABULARY = {
    "beta_2_decay": "beta2_decay",
    "epsilon_1": "eps[0]",
    "epsilon_2": "eps[1]",
    "clip_threshold": "d",
    "beta_1": "beta1",
    "beta_2_max": "beta2_max",
}
MOMENTUM_DTYPES = (None, torch.float32, torch.bfloat16, torch.float16, torch.int8)

# The names in a group that make its settings; a scheduler moves the learning rate besides.
SETTINGS = (
    *("beta2_decay", "eps", "d", "weight_decay", "maximize", "fused", "relative_step", "scale_parameter"),
    *("beta1", "momentum_dtype", "beta2_max", "factoring", "min_dim_size_to_factor"),
    *("stochastic_rounding", "compensated", "skip_nonfinite", "seed", "capturable"),
)


def translate(group: Mapping[str, Any]) -> Settings:
    """Translate a group, and refuse what does not fit.

    Raises:
        TypeError, ValueError: with the argument, the rule, the value and the remedy.
    """
    check_lr(group["lr"])
    eps = group["eps"]
    if not (isinstance(eps, tuple | list) and len(eps) == 2):
        raise ValueError(message("eps", "a pair (added to g², least parameter scale)", eps, "(1e-30, 1e-3) is usual."))
    hyperparameters = Hyperparameters(
        beta_2_decay=group["beta2_decay"],
        epsilon_1=1e-30 if eps[0] is None else eps[0],
        epsilon_2=eps[1],
        clip_threshold=group["d"],
        relative_step=group["relative_step"],
        beta_1=group["beta1"],
        beta_2_max=group["beta2_max"],
        scale_parameter=group["scale_parameter"],
        vocabulary=VOCABULARY,
    )
    if not in_range(group["weight_decay"], 0.0, math.inf):
        raise ValueError(message("weight_decay", ">= 0 and finite", group["weight_decay"], "Pass 0 for none."))
    for name in ("maximize", "stochastic_rounding", "compensated", "skip_nonfinite", "capturable"):
        if not isinstance(group[name], bool):
            raise TypeError(message(name, "True or False", group[name], "Leave it out for the default."))
    if group["compensated"] and group["stochastic_rounding"]:
        remedy = "Compensation rounds to nearest and forgets nothing; leave one of them out."
        raise ValueError(message("compensated", "False beside stochastic_rounding=True", True, remedy))
    for name in ("fused", "foreach"):
        if group[name] not in (None, True, False):
            raise TypeError(message(name, "None, True or False", group[name], "Leave it out for the default."))
    if group["momentum_dtype"] not in MOMENTUM_DTYPES:
        rule = "torch.float32, torch.bfloat16, torch.float16, torch.int8 or None"
        raise ValueError(message("momentum_dtype", rule, group["momentum_dtype"], "None stores what is computed."))
    seed = group["seed"]
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 1 << 64:
        raise ValueError(message("seed", "an integer >= 0 and < 2**64", seed, "The default is 0."))
    validate(group["factoring"], group["min_dim_size_to_factor"])
    return Settings(
        hyperparameters=hyperparameters,
        weight_decay=group["weight_decay"],
        maximize=group["maximize"],
        momentum_dtype=group["momentum_dtype"],
        stochastic_rounding=group["stochastic_rounding"],
        skip_nonfinite=group["skip_nonfinite"],
        seed=seed,
        compensated=group["compensated"],
    )


def check_lr(lr: object) -> None:
    if isinstance(lr, Tensor):  # its value stays on its device, unread
        if lr.numel() != 1:
            raise ValueError(message("lr", "a number or a tensor of one element", tuple(lr.shape), "Pass lr.mean()."))
    elif not in_range(lr, 0.0, math.inf):
        raise ValueError(message("lr", "a number >= 0 and finite", lr, "1e-2 is the default."))


def is_flat(param: Tensor) -> bool:
    """Whether it is FSDP1's FlatParameter, or one of the pieces that ``use_orig_params=True`` shows of it."""
    return bool(getattr(param, "_fsdp_flattened", False))


def check_origin(param: Tensor, given: Collection[int]) -> None:
    """Refuse the flat partitions that DeepSpeed's ZeRO writes into the groups in place of the parameters.

    Args:
        given: ids of the parameters that the user gave.
    """
    if param.dim() == 1 and id(param) not in given and "deepspeed" in sys.modules:
        remedy = "Use fully_shard (FSDP2), whose parameters keep their shapes; docs/sharding.md shows how."
        got = f"a flat partition of DeepSpeed ZeRO with shape {tuple(param.shape)}"
        raise RuntimeError(message("a parameter", "a tensor with the rows and columns of its layer", got, remedy))


def check_tensors(param: Tensor, grad: Tensor) -> None:
    """Refuse what no kernel can update, before any of the step's tensors is written."""
    if is_flat(param):
        remedy = "Use fully_shard (FSDP2), whose parameters keep their shapes; docs/sharding.md shows how."
        got = f"a flat shard of FSDP1 with shape {tuple(param.shape)}"
        raise RuntimeError(message("a parameter", "a tensor with the rows and columns of its layer", got, remedy))
    if grad.layout != torch.strided:
        remedy = "Build the embedding with sparse=False."
        raise RuntimeError(message("a gradient", "dense for Adafactor", str(grad.layout), remedy))
    for what, tensor in (("a parameter", param), ("a gradient", grad)):
        if tensor.dtype not in DTYPES:
            remedy = "Store a complex parameter as its torch.view_as_real." if tensor.is_complex() else "Convert it."
            rule = "float32, float64, bfloat16 or float16 for Adafactor"
            raise RuntimeError(message(what, rule, tensor.dtype, remedy))
    if not param.is_contiguous() and any(s == 0 and n > 1 for s, n in zip(param.stride(), param.shape, strict=True)):
        remedy = "Several elements share one place in memory; pass the tensor before expand()."
        raise RuntimeError(message("a parameter", "writable element by element", tuple(param.shape), remedy))
