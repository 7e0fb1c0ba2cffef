"""The step on immutable arrays, for XLA and for any array library with NumPy's names.

``ops`` is the library: ``keras.ops``, or ``jax.numpy`` with ``rsqrt``. Written so that a compiler which fuses
elementwise work into reductions needs no temporary of the parameter's size: every large expression is
consumed by one reduction or by the final update.

Rows and columns change places against ``reference.py`` (the equations are symmetric): column sums, which
run across memory, come first and plain, and the weighted sums W run along rows, which every backend reduces
fast. ``barrier`` keeps the compiler from computing g² once and storing it for the three reads.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from adafactor.factoring import Layout, Shape
from adafactor.hyperparameters import Hyperparameters

Array = Any  # of whatever library ``ops`` belongs to
Barrier = Callable[..., tuple[Array, ...]]


class Update(NamedTuple):
    """What one step found, in the dtype of the statistics.

    Attributes:
        slots: the new second-moment statistics by name, of the shapes ``Layout.slots`` gives.
        direction: two factors whose product with g is the normalised, clipped update (eqs. 7, 10, 13); each
            broadcasts to the parameter's shape.
        alpha: the step size (eq. 9), likewise.
    """

    slots: dict[str, Array]
    direction: tuple[Array, Array]
    alpha: Array


def identity(*arrays: Array) -> tuple[Array, ...]:
    return arrays


def schedule(ops: Any, t: Array, learning_rate: Array, hp: Hyperparameters, scheduled: bool) -> tuple[Array, Array]:
    """1 - beta(t) and rho(t) (eqs. 1 and 8) for a traced ``t`` >= 1, a scalar of the statistics' dtype."""
    decay = ops.power(t, hp.beta_2_decay)
    if hp.beta_2_max is not None:
        decay = ops.maximum(decay, 1.0 - hp.beta_2_max)
    rho = ops.minimum(learning_rate, ops.rsqrt(t)) if hp.caps(scheduled) else learning_rate
    return decay, rho


def measure(
    ops: Any,
    x: Array,
    g: Array,
    slots: dict[str, Array],
    layout: Layout,
    hp: Hyperparameters,
    decay: Array,
    rho: Array,
    keep: Array | None = None,
    barrier: Barrier = identity,
) -> Update:
    """Everything about one step of one parameter short of moving it (eqs. 2 to 11).

    Args:
        x, g: parameter and gradient of ``layout.shape``, in their own dtypes.
        slots: statistics by name; their dtype is that of the arithmetic.
        decay, rho: 1 - beta(t) and rho(t), scalars.
        keep: what decoupled weight decay multiplies x by before the step, if anything; RMS(x) is taken after it.
        barrier: returns its arguments behind a barrier of the compiler, if it needs one.

    A parameter without elements must not be passed: its means do not exist.
    """

    def g2(behind: Array) -> tuple[Array, Array]:
        """g² read anew, after ``behind`` is known."""
        g_behind, behind = barrier(g, behind)
        return ops.square(ops.cast(g_behind, dtype)), behind

    alpha = rho
    dtype = next(iter(slots.values())).dtype
    if hp.scale_parameter:
        rms = ops.sqrt(_total(ops, ops.square(ops.cast(x, dtype)), layout) / layout.slice_size)  # eq. 6
        alpha = rho * ops.maximum(rms if keep is None else rms * ops.absolute(keep), hp.epsilon_2)  # eq. 9
    if not layout.factored:
        v = slots["second_moment"]
        v = (1 - decay) * v + decay * (ops.square(ops.cast(g, dtype)) + hp.epsilon_1)  # eq. 11
        squares, v = g2(v)
        clip = _clip(ops, lambda: _total(ops, squares * _inverse(ops, v), layout), layout, hp)
        return Update({"second_moment": v}, (_inverse_sqrt(ops, v), clip), alpha)

    column = ops.reshape(slots["column"], _keep(layout.shape, layout.rows))
    S = _sum(ops, ops.square(ops.cast(g, dtype)), layout.rows)
    column = (1 - decay) * column + decay * (S / layout.n + hp.epsilon_1)  # eq. 3
    squares, column = g2(column)
    row = ops.reshape(slots["row"], _keep(layout.shape, layout.columns))
    row = (1 - decay) * row + decay * (_sum(ops, squares, layout.columns) / layout.m + hp.epsilon_1)  # eq. 2
    squares, row = g2(row)
    mu = _sum(ops, row, layout.rows) / layout.n  # = mean of column

    def sum_u2() -> Array:
        W = _sum(ops, squares * _inverse(ops, column), layout.columns)  # eq. 5 with the roles swapped
        return _sum(ops, mu * _sum(ops, W * _inverse(ops, row), layout.rows), layout.whole)  # eq. 7

    clip = _clip(ops, sum_u2, layout, hp)
    direction = (_inverse_sqrt(ops, row), ops.sqrt(mu) * _inverse_sqrt(ops, column) * clip)
    slots = {"row": ops.reshape(row, layout.row_shape), "column": ops.reshape(column, layout.column_shape)}
    return Update(slots, direction, alpha)


def apply(
    ops: Any,
    x: Array,
    g: Array,
    update: Update,
    momentum: Array | None,
    beta_1: float | None,
    keep: Array | None = None,
    barrier: Barrier = identity,
) -> tuple[Array, Array | None]:
    """The moved parameter, in its own dtype, and the new momentum (eqs. 12 and 13); ``keep`` as in ``measure``."""
    first, second = update.direction
    x_behind, g, alpha = barrier(x, g, update.alpha)
    g = ops.cast(g, first.dtype)
    if momentum is None or beta_1 is None:
        step = g * first * (second * alpha)
    else:
        momentum = beta_1 * momentum + (1 - beta_1) * (g * first * second)
        (momentum,) = barrier(momentum)  # else the parameter's update would compute it again, from the old one
        step = alpha * momentum
    # One rounding, of the result: a low-precision parameter would lose part of a rounded step.
    kept = ops.cast(x_behind, first.dtype)
    return ops.cast((kept if keep is None else kept * keep) - step, x.dtype), momentum


def _clip(ops: Any, sum_u2: Callable[[], Array], layout: Layout, hp: Hyperparameters) -> Array:
    """1 / max(1, RMS(u)/d) (eq. 10)."""
    if hp.clip_threshold is None:
        return 1.0
    return 1 / ops.maximum(ops.sqrt(sum_u2() / layout.slice_size) / hp.clip_threshold, 1.0)


def _sum(ops: Any, a: Array, axes: Shape) -> Array:
    return ops.sum(a, axis=axes, keepdims=True) if axes else a


def _total(ops: Any, squares: Array, layout: Layout) -> Array:
    """Sum over all axes of a slice, across memory first: XLA vectorises that, and no reduction to one number.

    The maximum changes nothing in a sum of squares; it stands between two sums that XLA would merge.
    """
    across = tuple(axis for axis in layout.whole if axis != len(layout.shape) - 1)
    if not across or across == layout.whole:
        return _sum(ops, squares, layout.whole)
    return _sum(ops, ops.maximum(_sum(ops, squares, across), 0.0), layout.whole)


def _keep(shape: Shape, reduced: Shape) -> Shape:
    return tuple(1 if axis in reduced else n for axis, n in enumerate(shape))


def _inverse(ops: Any, v: Array) -> Array:
    """1/v, and 0 where v is 0. NaN stays NaN: a broken statistic must show."""
    return ops.where(v == 0, 0, 1 / v)


def _inverse_sqrt(ops: Any, v: Array) -> Array:
    """v^(-1/2), and 0 where v is 0."""
    return ops.where(v == 0, 0, ops.rsqrt(v))
