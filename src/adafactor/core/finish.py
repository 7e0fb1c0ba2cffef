"""What lies between reading the gradient and moving the parameter: eqs. 2, 3, 7, 9, 10 of ``docs/algorithm.md``.

Numbers per row, column, matrix and slice, on the arrays of any library: ``ops`` has its functions.
"""

from __future__ import annotations

from typing import Any, Protocol

Array = Any  # of the library that ``ops`` belongs to


class Functions(Protocol):
    """Of an array library, under NumPy's names, and the reciprocal square root."""

    def absolute(self, a: Array, /) -> Array: ...
    def maximum(self, a: Array, b: Any, /) -> Array: ...
    def sqrt(self, a: Array, /) -> Array: ...
    def rsqrt(self, a: Array, /) -> Array: ...
    def where(self, condition: Array, a: Any, b: Any, /) -> Array: ...


def statistic(old: Array, mean_square: Array, ema_weight: Array, epsilon_1: Any) -> Array:
    """The new statistic of an old one and the mean of g² (eqs. 2 and 3; 11 with g² itself)."""
    return (1 - ema_weight) * old + ema_weight * (mean_square + epsilon_1)


def inverse(ops: Functions, v: Array) -> Array:
    """1/v, and 0 where v is 0. NaN stays NaN: a broken statistic must show."""
    return ops.where(v == 0, 0, 1 / ops.where(v == 0, 1, v))


def inverse_sqrt(ops: Functions, v: Array) -> Array:
    """v^(-1/2), and 0 where v is 0."""
    return ops.where(v == 0, 0, ops.rsqrt(ops.where(v == 0, 1, v)))


def update_rms(ops: Functions, sum_u2: Array, size: int) -> Array:
    """RMS(u) before clipping (eq. 7)."""
    return ops.sqrt(sum_u2 / size)


def clip_factor(ops: Functions, rms_u: Array, clip_threshold: Any) -> Array:
    """What the update is divided by (eq. 10)."""
    return ops.maximum(rms_u / clip_threshold, 1.0)


def parameter_scale(ops: Functions, Q: Array, size: int, epsilon_2: Any, decay_factor: Array | None = None) -> Array:
    """What the learning rate is multiplied by (eq. 9): of x, or of x times ``decay_factor``."""
    rms = ops.sqrt(Q / size)
    return ops.maximum(rms if decay_factor is None else rms * ops.absolute(decay_factor), epsilon_2)
