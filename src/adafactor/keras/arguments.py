"""What Keras's own optimizer arguments must be. Keras checks some of them; these checks come first."""

from __future__ import annotations

import math
from numbers import Integral
from typing import Any

from adafactor.core.errors import message
from adafactor.core.hyperparameters import in_range


def validate(
    *,
    weight_decay: Any,
    clipnorm: Any,
    clipvalue: Any,
    global_clipnorm: Any,
    ema_momentum: Any,
    ema_overwrite_frequency: Any,
    loss_scale_factor: Any,
    gradient_accumulation_steps: Any,
) -> None:
    """Refuse what does not fit, before the optimizer exists.

    Raises:
        TypeError, ValueError: with the argument, the rule, the value and the remedy.
    """
    for argument, value in (
        ("clipnorm", clipnorm),
        ("clipvalue", clipvalue),
        ("global_clipnorm", global_clipnorm),
        ("loss_scale_factor", loss_scale_factor),
    ):
        if value is not None:
            number(argument, value, "Pass None to switch it off.", positive=True)
    if weight_decay is not None:
        number("weight_decay", weight_decay, "Pass None to switch it off.")
    number("ema_momentum", ema_momentum, "Keras uses 0.99.", high=1.0)
    if ema_overwrite_frequency is not None:
        _count("ema_overwrite_frequency", ema_overwrite_frequency, 1, "Pass None to never overwrite.")
    if gradient_accumulation_steps is not None:
        _count("gradient_accumulation_steps", gradient_accumulation_steps, 2, "Pass None to update every step.")


def number(argument: str, value: Any, remedy: str, *, positive: bool = False, high: float = math.inf) -> Any:
    """``value``, if it is a number from 0 to ``high``, and above 0 if ``positive``."""
    ok = in_range(value, 0.0, high)
    if ok is None:
        raise TypeError(message(argument, "a number", value, remedy))
    if not ok or (positive and value == 0):
        bound = "> 0" if positive else ">= 0"
        raise ValueError(
            message(argument, f"{bound} and " + ("finite" if high == math.inf else f"<= {high:g}"), value, remedy)
        )
    return value


def _count(argument: str, value: Any, least: int, remedy: str) -> None:
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(message(argument, "an integer", value, remedy))
    if value < least:
        raise ValueError(message(argument, f">= {least}", value, remedy))
