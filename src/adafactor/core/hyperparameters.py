"""The numbers that define an Adafactor run: validated once, then plain data.

Nothing here knows about arrays. Equation numbers refer to ``docs/algorithm.md``; front ends translate
their own argument names (the ``vocabulary``) so that an error names what the user typed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import InitVar, dataclass, fields
from numbers import Real
from typing import Any, Literal

import numpy as np

from adafactor.core.errors import message

RelativeStep = bool | Literal["always"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Hyperparameters:
    """Everything Adafactor needs to know besides the learning rate, the step and the shapes.

    Args:
        beta_2_decay: exponent of the second-moment decay, at most 0. beta(t) = 1 - t**beta_2_decay (eq. 1).
        epsilon_1: added to every squared gradient, at least 0 (eqs. 2, 3, 11).
        epsilon_2: least parameter scale, at least 0 (eq. 9).
        clip_threshold: largest root mean square of an update ("d" in the paper), above 0; ``None``
            switches update clipping off (eq. 10).
        relative_step: ``True`` caps a constant learning rate at 1/sqrt(t) and leaves schedules alone,
            ``False`` never caps, ``"always"`` caps whatever it is given (eq. 8).
        beta_1: momentum of the normalised, clipped update, in [0, 1) (eq. 12); ``None`` or 0 keeps none.
        beta_2_max: upper bound of beta(t), in [0, 1]; ``None`` leaves it unbounded (eq. 1).
        scale_parameter: multiply the learning rate by the parameter's root mean square (eq. 9).
        vocabulary: the caller's own names for these arguments, used in error messages.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: an argument is out of range or not a finite number.
    """

    beta_2_decay: float = -0.8
    epsilon_1: float = 1e-30
    epsilon_2: float = 1e-3
    clip_threshold: float | None = 1.0
    relative_step: RelativeStep = True
    beta_1: float | None = None
    beta_2_max: float | None = None
    scale_parameter: bool = True
    vocabulary: InitVar[Mapping[str, str] | None] = None

    def __post_init__(self, vocabulary: Mapping[str, str] | None) -> None:
        words = vocabulary or {}
        for field in fields(self):
            object.__setattr__(self, field.name, plain(getattr(self, field.name)))

        def number(argument: str, rule: str, holds: bool | None, remedy: str) -> None:
            value = getattr(self, argument)
            if holds is None:
                raise TypeError(message(words.get(argument, argument), "a number", value, remedy))
            if not holds:
                raise ValueError(message(words.get(argument, argument), rule, value, remedy))

        def test(argument: str, low: float, high: float) -> bool | None:
            return in_range(getattr(self, argument), low, high)

        number("beta_2_decay", "<= 0 and finite", test("beta_2_decay", -math.inf, 0.0), "The paper uses -0.8.")
        number("epsilon_1", ">= 0 and finite", test("epsilon_1", 0.0, math.inf), "The paper uses 1e-30.")
        number("epsilon_2", ">= 0 and finite", test("epsilon_2", 0.0, math.inf), "The paper uses 1e-3.")
        if self.clip_threshold is not None:
            positive = test("clip_threshold", math.ulp(0.0), math.inf)
            number("clip_threshold", "> 0 and finite", positive, "Pass None to switch clipping off.")
        if self.beta_1 is not None:
            below_one = test("beta_1", 0.0, math.nextafter(1.0, 0.0))
            number("beta_1", ">= 0 and < 1", below_one, "Pass None to keep no momentum.")
        if self.beta_2_max is not None:
            number("beta_2_max", ">= 0 and <= 1", test("beta_2_max", 0.0, 1.0), "Pass None for no upper bound.")
        if not isinstance(self.scale_parameter, bool):
            name = words.get("scale_parameter", "scale_parameter")
            raise TypeError(message(name, "True or False", self.scale_parameter, "The paper uses True."))
        if not (isinstance(self.relative_step, bool) or self.relative_step == "always"):
            name = words.get("relative_step", "relative_step")
            remedy = 'True caps a constant learning rate at 1/sqrt(t), "always" a schedule too.'
            raise ValueError(message(name, 'True, False or "always"', self.relative_step, remedy))

    @property
    def momentum(self) -> float | None:
        """The momentum coefficient, or ``None`` where no momentum is kept (``beta_1`` of ``None`` or 0)."""
        return self.beta_1 if is_traced(self.beta_1) else self.beta_1 or None

    def decay(self, t: int) -> float:
        """1 - beta(t), the weight of the newest squared gradient (eq. 1), for update ``t`` counted from 1."""
        newest: float = float(t) ** self.beta_2_decay
        return newest if self.beta_2_max is None else max(newest, 1.0 - self.beta_2_max)

    def caps(self, scheduled: bool) -> bool:
        """Whether rho(t) is capped at 1/sqrt(t) (eq. 8); ``scheduled`` says the learning rate varies by itself."""
        return self.relative_step == "always" or (self.relative_step is True and not scheduled)

    def rho(self, learning_rate: float, t: int, scheduled: bool = False) -> float:
        """The relative step size rho(t) (eq. 8) for update ``t`` counted from 1."""
        return min(learning_rate, 1.0 / math.sqrt(t)) if self.caps(scheduled) else learning_rate


def plain(value: Any) -> Any:
    """Python's number or flag where ``value`` is NumPy's, or an array of one; anything else as it is."""
    return value.item() if isinstance(value, np.generic | np.ndarray) and value.size == 1 else value


def is_traced(value: object) -> bool:
    """Whether JAX is tracing ``value``: a number that nobody knows yet, as under ``optax.inject_hyperparams``."""
    return hasattr(value, "aval")


def in_range(value: object, low: float, high: float) -> bool | None:
    """Whether ``value`` is a finite number in [low, high]; ``None`` where it is no real number at all."""
    if is_traced(value):
        return True
    if isinstance(value, bool) or not isinstance(value, Real):
        return None
    return math.isfinite(value) and low <= float(value) <= high
