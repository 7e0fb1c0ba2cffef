"""What a user says to the PyTorch front end: translated into the project's own words, or refused.

Every refusal comes before the first tensor is written.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor

from adafactor.core.errors import message
from adafactor.core.factoring import Layout, Shape, layout, validate
from adafactor.core.hyperparameters import Hyperparameters, in_range
from adafactor.engine.torch.work import Settings

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

# The words of a group that decide which state there is and which backend takes it, and after them those that may change
# between steps; a scheduler moves the learning rate besides.
STRUCTURE = (
    *("fused", "beta1", "momentum_dtype", "factoring", "min_dim_size_to_factor"),
    *("stochastic_rounding", "compensated", "capturable"),
)
_words = itemgetter(
    *STRUCTURE,
    *("beta2_decay", "d", "weight_decay", "maximize", "relative_step", "scale_parameter", "beta2_max"),
    *("skip_nonfinite", "seed", "eps"),
)


def values_of(group: dict[str, Any]) -> tuple[object, ...]:
    """A group's words, to see whether they have changed; those of its structure come first."""
    values = _words(group)
    return (*values, *values[-1]) if isinstance(values[-1], list) else values  # a list may change in place


def translate(group: Mapping[str, Any]) -> Settings:
    """Translate a group, and refuse what does not fit.

    Raises:
        TypeError, ValueError: with the argument, the rule, the value and the remedy.
    """
    check_lr(group["lr"])
    eps = _pair(group["eps"])
    hyperparameters = Hyperparameters(
        beta_2_decay=plain(group["beta2_decay"]),
        epsilon_1=1e-30 if eps[0] is None else eps[0],
        epsilon_2=eps[1],
        clip_threshold=plain(group["d"]),
        relative_step=plain(group["relative_step"]),
        beta_1=plain(group["beta1"]),
        beta_2_max=plain(group["beta2_max"]),
        scale_parameter=plain(group["scale_parameter"]),
        vocabulary=VOCABULARY,
    )
    weight_decay = plain(group["weight_decay"])
    if not in_range(weight_decay, 0.0, math.inf):
        raise ValueError(message("weight_decay", ">= 0 and finite", group["weight_decay"], "Pass 0 for none."))
    flags = {name: plain(group[name]) for name in FLAGS}
    for name, value in flags.items():
        if not isinstance(value, bool):
            raise TypeError(message(name, "True or False", group[name], "Leave it out for the default."))
    if flags["compensated"] and flags["stochastic_rounding"]:
        remedy = "Compensation rounds to nearest and forgets nothing; leave one of them out."
        raise ValueError(message("compensated", "False beside stochastic_rounding=True", True, remedy))
    for name in ("fused", "foreach"):
        if plain(group[name]) not in (None, True, False):
            raise TypeError(message(name, "None, True or False", group[name], "Leave it out for the default."))
    if group["momentum_dtype"] not in MOMENTUM_DTYPES:
        rule = "torch.float32, torch.bfloat16, torch.float16, torch.int8 or None"
        raise ValueError(message("momentum_dtype", rule, group["momentum_dtype"], "None stores what is computed."))
    seed = 0 if group["seed"] is None else plain(group["seed"])
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 1 << 64:
        raise ValueError(message("seed", "an integer >= 0 and < 2**64", seed, "The default is None."))
    validate(group["factoring"], group["min_dim_size_to_factor"])
    return Settings(
        hyperparameters=hyperparameters,
        weight_decay=weight_decay,
        maximize=flags["maximize"],
        momentum_dtype=group["momentum_dtype"],
        stochastic_rounding=flags["stochastic_rounding"],
        skip_nonfinite=flags["skip_nonfinite"],
        seed=seed,
        compensated=flags["compensated"],
        fused=plain(group["fused"]),
    )


def layout_of(group: Mapping[str, Any], shape: Shape, name: str) -> Layout:
    """The layout of a tensor of a group."""
    return layout(shape, group["factoring"], group["min_dim_size_to_factor"], name=name)


FLAGS = ("maximize", "stochastic_rounding", "compensated", "skip_nonfinite", "capturable")


def plain(value: Any) -> Any:
    """NumPy's numbers and flags, arrays of one element among them, as Python's own; anything else as it is."""
    if hasattr(value, "dtype") and getattr(value, "size", None) == 1 and callable(getattr(value, "item", None)):
        return value.item()
    return value


def _pair(eps: Any) -> tuple[Any, Any]:
    """Two numbers, of a tuple, a list, an array or a configuration's own kind of list."""
    values = list(eps) if isinstance(eps, Sequence) or getattr(eps, "shape", None) == (2,) else []
    if len(values) != 2 or isinstance(eps, str):
        raise ValueError(message("eps", "a pair (added to g², least parameter scale)", eps, "(1e-30, 1e-3) is usual."))
    return plain(values[0]), plain(values[1])


def check_lr(lr: object) -> None:
    if type(lr) is float and 0.0 <= lr < math.inf:
        return
    if isinstance(lr, Tensor):  # its value stays on its device, unread
        if lr.numel() != 1:
            raise ValueError(message("lr", "a number or a tensor of one element", tuple(lr.shape), "Pass lr.mean()."))
    elif not in_range(plain(lr), 0.0, math.inf):
        raise ValueError(message("lr", "a number >= 0 and finite", lr, "1e-2 is the default."))
