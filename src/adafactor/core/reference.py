"""Adafactor in NumPy, line by line: the oracle every other implementation is tested against.

Read it beside ``docs/algorithm.md``; the equation numbers are the same. It is written to be checked, not to
be fast: temporaries are as large as the parameter. Arithmetic runs in ``dtype`` (float64 unless told).

Three verbs make a step. ``measure`` reads the gradient and the parameter and returns sums; on several
devices the ``combine`` between them is an addition of those sums over the shards; ``apply`` finishes the
column statistic, knows the root mean square of the update without having formed it, and moves the parameter.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from adafactor.core.factoring import Layout
from adafactor.core.hyperparameters import Hyperparameters

Array = NDArray[Any]


@dataclass
class State:
    """What Adafactor remembers of one parameter besides the number of updates.

    Attributes:
        second_moment: the statistics by name, of the shapes ``Layout.slots`` gives: ``row`` and ``column``,
            or ``second_moment``.
        momentum: average of the normalised, clipped updates, of the parameter's shape, or ``None``.
        t: number of updates made.
    """

    second_moment: dict[str, Array]
    momentum: Array | None = None
    t: int = 0


@dataclass
class Sums:
    """What ``measure`` found. All but ``rows`` adds up over shards that split the rows of a matrix.

    Attributes:
        rows: the finished row statistic (eq. 2), or the finished second moment (eq. 11).
        S: column sums of g² (eq. 4), keeping reduced axes; ``None`` if unfactored.
        W: column sums of g²/row (eq. 5), likewise; the sum of u² itself if unfactored (eq. 11).
        Q: sum of x² per slice (eq. 6).
    """

    rows: Array
    S: Array | None
    W: Array
    Q: Array


@dataclass
class Adafactor:
    """The oracle's loop over one parameter: ``x = Adafactor(layout, hyperparameters).step(x, g, learning_rate)``."""

    layout: Layout
    hyperparameters: Hyperparameters = field(default_factory=Hyperparameters)
    dtype: DTypeLike = np.float64
    scheduled: bool = False
    state: State = field(init=False)

    def __post_init__(self) -> None:
        self.state = init(self.layout, self.hyperparameters, self.dtype)

    def step(self, x: ArrayLike, g: ArrayLike, learning_rate: float) -> Array:
        x, self.state = step(
            x, g, self.state, self.layout, self.hyperparameters, learning_rate, self.scheduled, self.dtype
        )
        return x


def init(layout: Layout, hp: Hyperparameters, dtype: DTypeLike = np.float64) -> State:
    """The state before the first update: all zeros (their weight is 0 at t = 1, eq. 1)."""
    momentum = None if hp.momentum is None else np.zeros(layout.shape, dtype)
    return State({name: np.zeros(shape, dtype) for name, shape in layout.slots.items()}, momentum)


def step(
    x: ArrayLike,
    g: ArrayLike,
    state: State,
    layout: Layout,
    hp: Hyperparameters,
    learning_rate: float,
    scheduled: bool = False,
    dtype: DTypeLike = np.float64,
) -> tuple[Array, State]:
    """One update of one parameter, on one device.

    Args:
        x, g: parameter and gradient, of shape ``layout.shape``.
        state: the state so far; it is not modified.
        learning_rate: before the relative-step rule (eq. 8).
        scheduled: whether the learning rate comes from a schedule.

    Returns:
        The parameter, of ``dtype``, and the state after the update.
    """
    x, g = np.asarray(x, dtype), np.asarray(g, dtype)
    if x.shape != layout.shape or g.shape != layout.shape:
        raise ValueError(f"x and g must have shape {layout.shape}, got {x.shape} and {g.shape}.")
    t = state.t + 1
    if not layout.size:
        return x, State(state.second_moment, state.momentum, t)
    rho = hp.rho(learning_rate, t, scheduled)
    sums = measure(x, g, state, layout, hp, t)
    return apply(x, g, sums, state, layout, hp, t, rho)


def measure(x: Array, g: Array, state: State, layout: Layout, hp: Hyperparameters, t: int) -> Sums:
    """Read g and x once (eqs. 2 to 6, and 11 for an unfactored parameter)."""
    decay = hp.decay(t)  # 1 - beta(t), eq. 1
    Q = np.sum(x * x, axis=layout.whole, keepdims=True)  # eq. 6
    if not layout.factored:
        v = (1 - decay) * state.second_moment["second_moment"] + decay * (g * g + hp.epsilon_1)  # eq. 11
        W = np.sum(ratio(g * g, v), axis=layout.whole, keepdims=True)
        return Sums(v, None, W, Q)
    row = np.expand_dims(state.second_moment["row"], layout.columns)
    row = (1 - decay) * row + decay * (np.sum(g * g, layout.columns, keepdims=True) / layout.m + hp.epsilon_1)  # eq. 2
    S = np.sum(g * g, axis=layout.rows, keepdims=True)  # eq. 4
    W = np.sum(ratio(g * g, row), axis=layout.rows, keepdims=True)  # eq. 5
    return Sums(row, S, W, Q)


def apply(
    x: Array, g: Array, sums: Sums, state: State, layout: Layout, hp: Hyperparameters, t: int, rho: float
) -> tuple[Array, State]:
    """Finish the statistics and move the parameter (eqs. 3 and 7 to 13)."""
    decay = hp.decay(t)
    if sums.S is None:
        second_moment = {"second_moment": sums.rows}
        u = g * inverse_sqrt(sums.rows)
        sum_u2 = sums.W
    else:
        column = np.expand_dims(state.second_moment["column"], layout.rows)
        column = (1 - decay) * column + decay * (sums.S / layout.n + hp.epsilon_1)  # eq. 3
        mu = np.mean(column, axis=layout.columns, keepdims=True)  # = mean of row
        sum_u2 = mu * np.sum(ratio(sums.W, column), axis=layout.columns, keepdims=True)  # eq. 7, per matrix
        sum_u2 = np.sum(sum_u2, axis=layout.whole, keepdims=True)  # per slice
        u = g * inverse_sqrt(sums.rows) * (np.sqrt(mu) * inverse_sqrt(column))
        second_moment = {
            "row": sums.rows.reshape(layout.row_shape),
            "column": column.reshape(layout.column_shape),
        }
    alpha: float | Array = rho
    if hp.scale_parameter:
        alpha = rho * np.maximum(hp.epsilon_2, np.sqrt(sums.Q / layout.slice_size))  # eq. 9
    if hp.clip_threshold is not None:
        u = u / np.maximum(1, np.sqrt(sum_u2 / layout.slice_size) / hp.clip_threshold)  # eq. 10
    momentum = None
    if hp.momentum is not None:
        assert state.momentum is not None
        momentum = u = hp.momentum * state.momentum + (1 - hp.momentum) * u  # eq. 12
    return x - alpha * u, State(second_moment, momentum, t)  # eq. 13


def ratio(a: Array, b: Array) -> Array:
    """a/b with 0/0 = 0: an element that never had a gradient takes no step."""
    return np.divide(a, b, out=np.zeros(np.broadcast_shapes(a.shape, b.shape), a.dtype), where=(a != 0) | (b != 0))


def inverse_sqrt(v: Array) -> Array:
    """v^(-1/2), and 0 where v is 0: where the statistic is 0, so is every gradient behind it."""
    with np.errstate(divide="ignore"):
        return np.where(v == 0, 0, 1 / np.sqrt(v)).astype(v.dtype)
