"""What Keras's own optimizer arguments must be. Keras checks some of them; these checks come first."""

from __future__ import annotations

import math
from numbers import Integral
from typing import Any

from adafactor.core.errors import message
from adafactor.core.hyperparameters import in_range, plain


def validate(*, ema_momentum: Any, **switches: Any) -> dict[str, Any]:
    """The arguments as Python's numbers; those that are ``None`` stay so. Refused before the optimizer exists.

    Raises:
        TypeError, ValueError: with the argument, the rule, the value and the remedy.
    """
    checked = {"ema_momentum": number("ema_momentum", ema_momentum, "Keras uses 0.99.", high=1.0)}
    for argument, value in switches.items():
        if value is None:
            checked[argument] = None
        elif argument in _COUNTS:
            checked[argument] = _count(argument, value, *_COUNTS[argument])
        else:
            remedy = "Pass None to switch it off."
            checked[argument] = number(argument, value, remedy, positive=argument != "weight_decay")
    return checked


#: The least value of what counts steps, and how to do without.
_COUNTS = {
    "ema_overwrite_frequency": (1, "Pass None to never overwrite."),
    "gradient_accumulation_steps": (2, "Pass None to update every step."),
}


def number(argument: str, value: Any, remedy: str, *, positive: bool = False, high: float = math.inf) -> Any:
    """``value`` as Python's number, if it is one from 0 to ``high``, and above 0 if ``positive``."""
    value = plain(value)
    ok = in_range(value, 0.0, high)
    if ok is None:
        raise TypeError(message(argument, "a number", value, remedy))
    if not ok or (positive and value == 0):
        bound = "> 0" if positive else ">= 0"
        raise ValueError(
            message(argument, f"{bound} and " + ("finite" if high == math.inf else f"<= {high:g}"), value, remedy)
        )
    return value


def _count(argument: str, value: Any, least: int, remedy: str) -> Any:
    value = plain(value)
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(message(argument, "an integer", value, remedy))
    if value < least:
        raise ValueError(message(argument, f">= {least}", value, remedy))
    return value
