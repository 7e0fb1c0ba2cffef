"""The step on immutable arrays, for XLA and for any array library with NumPy's names.

``ops`` is the library: ``keras.ops``, or ``jax.numpy`` with ``rsqrt``. Written so that a compiler which fuses
elementwise work into reductions needs no temporary of the parameter's size: every large expression is
consumed by one reduction or by the final update.

Rows and columns change places against ``reference.py`` (the equations are symmetric): column sums, which
run across memory, come first and plain, and the weighted sums W run along rows, which every backend reduces
fast. ``barrier`` keeps the compiler from computing g² once and storing it for the three reads.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import Any, NamedTuple

from adafactor.core.factoring import Layout, Shape
from adafactor.core.hyperparameters import Hyperparameters

Array = Any  # of whatever library ``ops`` belongs to
Barrier = Callable[..., tuple[Array, ...]]


class Update(NamedTuple):
    """What one step found, in the dtype of the statistics.

    Attributes:
        slots: the new second-moment statistics by name, of the shapes ``Layout.slots`` gives.
        direction: two factors whose product with g is the normalised, clipped update (eqs. 7, 10, 13); each
            broadcasts to the parameter's shape.
        alpha: the step size (eq. 9), likewise.
        report: where asked for, RMS(u) before clipping (eq. 7), what clipping divides by (eq. 10) and the parameter
            scale (eq. 9; 1 where it is off), likewise.
    """

    slots: dict[str, Array]
    direction: tuple[Array, Array]
    alpha: Array
    report: tuple[Array, Array | float, Array | float] | None = None


class Constants(NamedTuple):
    """What a step takes from ``Hyperparameters``, where its numbers may be traced."""

    epsilon_1: Any
    epsilon_2: Any
    clip_threshold: Any
    scale_parameter: bool


def identity(*arrays: Array) -> tuple[Array, ...]:
    return arrays


def schedule(ops: Any, t: Array, learning_rate: Array, hp: Hyperparameters, scheduled: bool) -> tuple[Array, Array]:
    """1 - beta(t) and rho(t) (eqs. 1 and 8) for a traced ``t`` >= 1, a scalar of the statistics' dtype."""
    decay = ops.power(t, hp.beta_2_decay)
    if hp.beta_2_max is not None:
        decay = ops.maximum(decay, 1.0 - hp.beta_2_max)
    rho = ops.minimum(learning_rate, ops.rsqrt(t)) if hp.caps(scheduled) else learning_rate
    return decay, rho


class Partial(NamedTuple):
    """A sum over ``axes`` of the parameter: complete unless shards split one of them."""

    sum: Array
    axes: Shape


#: A step that stops ``ROUNDS`` times for sums to be added up over shards, and is sent the totals.
Rounds = Generator[list[Partial], list[Array], Update]
ROUNDS = 4


def measure(
    ops: Any,
    x: Array,
    g: Array,
    slots: dict[str, Array],
    layout: Layout,
    hp: Hyperparameters | Constants,
    decay: Array,
    rho: Array,
    keep: Array | None = None,
    barrier: Barrier = identity,
    report: bool = False,
) -> Update:
    """Everything about one step of one parameter short of moving it (eqs. 2 to 11), on one device.

    Args:
        x, g: parameter and gradient of ``layout.shape``, in their own dtypes.
        slots: statistics by name; their dtype is that of the arithmetic.
        decay, rho: 1 - beta(t) and rho(t): scalars, or one value per slice in a shape that broadcasts to x.
        keep: what decoupled weight decay multiplies x by before the step, if anything; RMS(x) is taken after it.
        barrier: returns its arguments behind a barrier of the compiler, if it needs one.
        report: fill ``Update.report``.

    A parameter without elements must not be passed: its means do not exist.
    """
    rounds = measuring(ops, x, g, slots, layout, hp, decay, rho, keep, barrier, report=report)
    partials = next(rounds)
    while True:
        try:
            partials = rounds.send([partial.sum for partial in partials])  # one device: nothing to add
        except StopIteration as finished:
            update: Update = finished.value
            return update


def measuring(
    ops: Any,
    x: Array,
    g: Array,
    slots: dict[str, Array],
    layout: Layout,
    hp: Hyperparameters | Constants,
    decay: Array,
    rho: Array,
    keep: Array | None = None,
    barrier: Barrier = identity,
    rows_first: bool = False,
    report: bool = False,
) -> Rounds:
    """As `measure` on one of several shards: the arrays are the shard's, ``layout`` is the whole parameter's.

    ``rows_first`` finishes the row statistic before the columns'. A shard that holds whole rows needs nobody else
    for that, and the sums of its one other round can share an all-reduce with those of every other parameter.
    """
    dtype = next(iter(slots.values())).dtype

    def again(behind: Array) -> tuple[Array, Array]:
        """g read anew, after ``behind`` is known."""
        g_behind, behind = barrier(g, behind)
        return ops.cast(g_behind, dtype), behind

    Q = [_total(ops, ops.square(ops.cast(x, dtype)), layout)] if hp.scale_parameter else []  # eq. 6

    needs_u2 = report or hp.clip_threshold is not None

    def update(slots: dict[str, Array], first: Array, second: Array) -> Update:
        """Eqs. 7, 9 and 10 from the sums in ``Q`` and ``u2``."""
        rms_u: Any = ops.sqrt(u2[0] / layout.slice_size) if u2 else None
        clip = None if hp.clip_threshold is None else ops.maximum(rms_u / hp.clip_threshold, 1.0)
        scale = None
        if Q:
            rms = ops.sqrt(Q[0] / layout.slice_size)
            scale = ops.maximum(rms if keep is None else rms * ops.absolute(keep), hp.epsilon_2)
        return Update(
            slots,
            (first, second if clip is None else second * (1 / clip)),
            rho if scale is None else rho * scale,
            (rms_u, 1.0 if clip is None else clip, 1.0 if scale is None else scale) if report else None,
        )

    if not layout.factored:
        v = slots["second_moment"]
        v = (1 - decay) * v + decay * (ops.square(ops.cast(g, dtype)) + hp.epsilon_1)  # eq. 11
        g_again, v = again(v)
        u2 = [_total(ops, ops.square(g_again) * _inverse(ops, v), layout)] if needs_u2 else []
        yield []
        Q, u2 = _split((yield [Partial(a, layout.whole) for a in (*Q, *u2)]), len(Q))
        yield []
        yield []
        return update({"second_moment": v}, _inverse_sqrt(ops, v), 1.0)

    # `first` is finished before `second` is begun; each is a sum over the axes of the other.
    names, over, counts = ("column", "row"), (layout.rows, layout.columns), (layout.n, layout.m)
    if rows_first:
        names, over, counts = names[::-1], over[::-1], counts[::-1]
    old = [_spread(ops, slots[name], axes) for name, axes in zip(names, over, strict=True)]
    stack = tuple(axis for axis in layout.whole if axis not in (*layout.rows, *layout.columns))

    S = _sum(ops, ops.square(ops.cast(g, dtype)), over[0])  # eq. 4
    S, *Q = yield [Partial(a, over[0]) for a in (S, *Q)]
    first = (1 - decay) * old[0] + decay * (S / counts[0] + hp.epsilon_1)  # eq. 3
    g_again, first = again(first)
    S = _sum(ops, ops.square(g_again), over[1])
    W = []
    if needs_u2:
        g_again, S = again(S)
        # Divided before it is squared: g² alone is 0 below 1e-23, where u can still be large.
        W = [_sum(ops, ops.square(g_again * _inverse_sqrt(ops, first)), over[1])]  # eq. 5
    S, *totals = yield [Partial(a, over[1]) for a in (S, *Q, *W)]
    Q, W = _split(totals, len(Q))
    second = (1 - decay) * old[1] + decay * (S / counts[1] + hp.epsilon_1)  # eq. 2
    mu, *u2 = yield [Partial(_sum(ops, a, over[0]), over[0]) for a in (second, *(w * _inverse(ops, second) for w in W))]
    mu = mu / counts[0]  # = mean of either statistic
    Q, u2 = _split((yield [Partial(a, stack) for a in (*Q, *(_sum(ops, mu * u, stack) for u in u2))]), len(Q))  # eq. 7

    column, row = (second, first) if rows_first else (first, second)
    slots = {name: ops.reshape(a, slots[name].shape) for name, a in (("row", row), ("column", column))}
    return update(slots, _inverse_sqrt(ops, row), ops.sqrt(mu) * _inverse_sqrt(ops, column))


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
        step = g * (first * alpha) * second  # second * alpha may overflow where a column had no gradient: 0 * inf
    else:
        momentum = beta_1 * momentum + (1 - beta_1) * (g * first * second)
        (momentum,) = barrier(momentum)  # else the parameter's update would compute it again, from the old one
        step = alpha * momentum
    # One rounding, of the result: a low-precision parameter would lose part of a rounded step.
    kept = ops.cast(x_behind, first.dtype)
    return ops.cast((kept if keep is None else kept * keep) - step, x.dtype), momentum


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


def _spread(ops: Any, statistic: Array, removed: Shape) -> Array:
    """The statistic with an axis of size 1 in place of each that it was reduced over."""
    shape = list(statistic.shape)
    for axis in removed:
        shape.insert(axis, 1)
    return ops.reshape(statistic, tuple(shape))


def _split(arrays: list[Array], count: int) -> tuple[list[Array], list[Array]]:
    return arrays[:count], arrays[count:]


def _inverse(ops: Any, v: Array) -> Array:
    """1/v, and 0 where v is 0. NaN stays NaN: a broken statistic must show."""
    return ops.where(v == 0, 0, 1 / v)


def _inverse_sqrt(ops: Any, v: Array) -> Array:
    """v^(-1/2), and 0 where v is 0."""
    return ops.where(v == 0, 0, ops.rsqrt(v))
