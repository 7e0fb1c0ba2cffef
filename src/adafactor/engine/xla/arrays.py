"""The step on immutable arrays, for XLA and for any array library with NumPy's names.

``ops`` is the library: `functions` of ``keras.ops``, or of ``jax.numpy``. Written so that a compiler which fuses
elementwise work into reductions needs no temporary of the parameter's size: every large expression is
consumed by one reduction or by the final update.

Rows and columns change places against ``reference.py`` (the equations are symmetric): column sums, which
run across memory, come first and plain, and the weighted sums W run along rows, which every backend reduces
fast. ``ops.barrier`` keeps the compiler from computing g² once and storing it for the three reads.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, NamedTuple

from adafactor.core import finish
from adafactor.core.factoring import Layout, Shape
from adafactor.core.hyperparameters import Hyperparameters

Array = Any  # of whatever library ``ops`` belongs to

_NAMES = (
    *("absolute", "broadcast_to", "cast", "maximum", "minimum", "power", "reshape", "rsqrt", "sqrt", "square"),
    *("stack", "sum", "where"),
)


def functions(library: Any, **others: Any) -> SimpleNamespace:
    """What a step needs of an array library: its functions under NumPy's names, ``cast``, ``rsqrt`` and ``barrier``.

    ``others`` are those that the library has under another name. ``barrier`` returns its arguments behind a barrier
    of the compiler, if it needs one.
    """
    functions = {name: getattr(library, name) for name in _NAMES if name not in others}
    return SimpleNamespace(**{"barrier": _identity} | functions | others)


def _identity(*arrays: Array) -> tuple[Array, ...]:
    return arrays


class Tensor(NamedTuple):
    """One parameter in one update.

    Attributes:
        layout: the role of every axis; the parameter has elements.
        x, g: parameter and gradient of ``layout.shape``, in their own dtypes.
        slots: statistics by the names of ``Layout.slots``; their dtype is that of the arithmetic.
        decay_factor: what x is multiplied by before the step: a scalar, or one value per slice that broadcasts to x.
        momentum: as in eq. 12, or ``None``.
    """

    layout: Layout
    x: Array
    g: Array
    slots: dict[str, Array]
    decay_factor: Array | float = 1.0
    momentum: Array | None = None

    @property
    def dtype(self) -> Any:
        """Of the statistics and of the arithmetic."""
        return next(iter(self.slots.values())).dtype

    @property
    def decays(self) -> bool:
        return not (isinstance(self.decay_factor, float) and self.decay_factor == 1)


@dataclass(frozen=True)
class Constants:
    """What a step takes from ``Hyperparameters``, where its numbers may be traced."""

    epsilon_1: Any
    epsilon_2: Any
    clip_threshold: Any
    beta_1: Any
    scale_parameter: bool

    @classmethod
    def of(cls, hp: Hyperparameters) -> Constants:
        return cls(hp.epsilon_1, hp.epsilon_2, hp.clip_threshold, hp.momentum, hp.scale_parameter)


@dataclass(frozen=True)
class Settings:
    """What all tensors of an update share.

    Attributes:
        ema_weight, rho: 1 - beta(t) and the step size before the parameter scale (eqs. 1 and 8): scalars, or one value
            per slice in a shape that broadcasts to x.
        scale_after_decay: take RMS(x) of the parameter times its ``decay_factor``, as in Keras.
        diagnostics: whether they are asked for.
    """

    hp: Constants
    ema_weight: Array
    rho: Array
    scale_after_decay: bool = False
    diagnostics: bool = False


class Update(NamedTuple):
    """A step short of making it, in the dtype of the statistics.

    Attributes:
        slots: the new second-moment statistics by name, of the shapes ``Layout.slots`` gives.
        direction: two factors whose product with g is the normalised, clipped update (eqs. 7, 10, 13); each
            broadcasts to the parameter's shape.
        alpha: the step size (eq. 9), likewise. Multiply the first factor by it: the second may be huge where a column
            had no gradient, and infinity times 0 is NaN.
        diagnostics: where asked for, RMS(u) before clipping (eq. 7), what clipping divides by (eq. 10) and the
            parameter scale (eq. 9; 1 where it is off), likewise.
    """

    slots: dict[str, Array]
    direction: tuple[Array, Array]
    alpha: Array
    diagnostics: tuple[Array, Array | float, Array | float] | None = None


def schedule(ops: Any, t: Array, learning_rate: Array, hp: Hyperparameters, scheduled: bool) -> tuple[Array, Array]:
    """1 - beta(t) and rho(t) (eqs. 1 and 8) for a traced ``t`` >= 1, a scalar of the statistics' dtype."""
    ema_weight = ops.power(t, hp.beta_2_decay)
    if hp.beta_2_max is not None:
        ema_weight = ops.maximum(ema_weight, 1.0 - hp.beta_2_max)
    rho = ops.minimum(learning_rate, ops.rsqrt(t)) if hp.caps(scheduled) else learning_rate
    return ema_weight, rho


class Partial(NamedTuple):
    """A sum over ``axes`` of the parameter: complete unless shards split one of them."""

    sum: Array
    axes: Shape


#: A step that stops ``ROUNDS`` times for sums to be added up over shards, and is sent the totals.
Rounds = Generator[list[Partial], list[Array], Update]
ROUNDS = 4


def measure(ops: Any, tensor: Tensor, settings: Settings) -> Update:
    """Everything about one step of one parameter short of moving it (eqs. 2 to 11), on one device."""
    rounds = measuring(ops, tensor, settings)
    partials = next(rounds)
    while True:
        try:
            partials = rounds.send([partial.sum for partial in partials])  # one device: nothing to add
        except StopIteration as finished:
            update: Update = finished.value
            return update


def measuring(ops: Any, tensor: Tensor, settings: Settings, transposed: bool = False) -> Rounds:
    """As `measure` on one of several shards: the arrays are the shard's, ``tensor.layout`` is the whole parameter's.

    ``transposed`` finishes the row statistic before the columns'. A shard that holds whole rows needs nobody else
    for that, and the sums of its one other round can share an all-reduce with those of every other parameter.
    """
    layout, x, g, slots = tensor.layout, tensor.x, tensor.g, tensor.slots
    hp, ema_weight, dtype = settings.hp, settings.ema_weight, tensor.dtype

    def again(behind: Array) -> tuple[Array, Array]:
        """g read anew, after ``behind`` is known."""
        g_behind, behind = ops.barrier(g, behind)
        return ops.cast(g_behind, dtype), behind

    Q = [_total(ops, ops.square(ops.cast(x, dtype)), layout)] if hp.scale_parameter else []  # eq. 6

    needs_u2 = settings.diagnostics or hp.clip_threshold is not None

    def update(slots: dict[str, Array], first: Array, second: Array) -> Update:
        """Eqs. 7, 9 and 10 from the sums in ``Q`` and ``u2``."""
        rms_u = finish.update_rms(ops, u2[0], layout.slice_size) if u2 else None
        clip = None if hp.clip_threshold is None else finish.clip_factor(ops, rms_u, hp.clip_threshold)
        scale = None
        if Q:
            factor = tensor.decay_factor if settings.scale_after_decay and tensor.decays else None
            scale = finish.parameter_scale(ops, Q[0], layout.slice_size, hp.epsilon_2, factor)
        diagnostics = rms_u, 1.0 if clip is None else clip, 1.0 if scale is None else scale
        return Update(
            slots,
            (first, second if clip is None else second * (1 / clip)),
            settings.rho if scale is None else settings.rho * scale,
            diagnostics if settings.diagnostics else None,
        )

    if not layout.factored:
        squares = ops.square(ops.cast(g, dtype))
        v = finish.statistic(slots["second_moment"], squares, ema_weight, hp.epsilon_1)  # eq. 11
        g_again, v = again(v)
        u2 = [_total(ops, ops.square(g_again) * finish.inverse(ops, v), layout)] if needs_u2 else []
        yield []
        Q, u2 = _split((yield [Partial(a, layout.whole) for a in (*Q, *u2)]), len(Q))
        yield []
        yield []
        return update({"second_moment": v}, finish.inverse_sqrt(ops, v), 1.0)

    # `first` is finished before `second` is begun; each is a sum over the axes of the other.
    names, over, counts = ("column", "row"), (layout.rows, layout.columns), (layout.n, layout.m)
    if transposed:
        names, over, counts = names[::-1], over[::-1], counts[::-1]
    old = [spread(ops, slots[name], axes) for name, axes in zip(names, over, strict=True)]
    stack = tuple(axis for axis in layout.whole if axis not in (*layout.rows, *layout.columns))

    S = _sum(ops, ops.square(ops.cast(g, dtype)), over[0])  # eq. 4
    S, *Q = yield [Partial(a, over[0]) for a in (S, *Q)]
    first = finish.statistic(old[0], S / counts[0], ema_weight, hp.epsilon_1)  # eq. 3
    g_again, first = again(first)
    S = _sum(ops, ops.square(g_again), over[1])
    W = []
    if needs_u2:
        g_again, S = again(S)
        # Divided before it is squared: g² alone is 0 below 1e-23, where u can still be large.
        W = [_sum(ops, ops.square(g_again * finish.inverse_sqrt(ops, first)), over[1])]  # eq. 5
    S, *totals = yield [Partial(a, over[1]) for a in (S, *Q, *W)]
    Q, W = _split(totals, len(Q))
    second = finish.statistic(old[1], S / counts[1], ema_weight, hp.epsilon_1)  # eq. 2
    ratios = [w * finish.inverse(ops, second) for w in W]
    mu, *u2 = yield [Partial(_sum(ops, a, over[0]), over[0]) for a in (second, *ratios)]
    mu = mu / counts[0]  # = mean of either statistic
    Q, u2 = _split((yield [Partial(a, stack) for a in (*Q, *(_sum(ops, mu * u, stack) for u in u2))]), len(Q))  # eq. 7

    column, row = (second, first) if transposed else (first, second)
    slots = {name: ops.reshape(a, slots[name].shape) for name, a in (("row", row), ("column", column))}
    return update(slots, finish.inverse_sqrt(ops, row), ops.sqrt(mu) * finish.inverse_sqrt(ops, column))


def measured(ops: Any, tensor: Tensor, out: list[Array], epsilon_1: Any) -> Update:
    """What a call of the kernels' measure has returned for a tensor, so that it broadcasts to x.

    Args:
        out: row, column, their factors and alpha; if unfactored 1 - beta, the second factor and alpha.
    """
    layout = tensor.layout
    if layout.factored:
        row, column, first, second, alpha = out
        slots = {"row": row, "column": column}
        return Update(slots, (spread(ops, first, layout.columns), spread(ops, second, layout.rows)), alpha)
    # The weight has come through the call: what reads it, and writes v, comes after the call has read v.
    weight, second, alpha = out
    v = tensor.slots["second_moment"]
    v = finish.statistic(v, ops.square(ops.cast(tensor.g, v.dtype)), weight, epsilon_1)  # eq. 11
    return Update({"second_moment": v}, (finish.inverse_sqrt(ops, v), second), alpha)


def diagnosed(ops: Any, update: Update, layout: Layout) -> Array:
    """The diagnostics of an update as one array, of the lengths of the batch axes and 3."""
    assert update.diagnostics is not None
    rms_u = update.diagnostics[0]
    columns = [ops.broadcast_to(ops.cast(a, rms_u.dtype), rms_u.shape) for a in update.diagnostics]
    return ops.reshape(ops.stack(columns, -1), (*(rms_u.shape[axis] for axis in layout.batch), 3))


def apply(ops: Any, tensor: Tensor, update: Update, beta_1: Any = None) -> Tensor:
    """The tensor moved, in its own dtype, with its new statistics and momentum (eqs. 12 and 13)."""
    first, second = update.direction
    x, g, alpha = ops.barrier(tensor.x, tensor.g, update.alpha)
    g = ops.cast(g, first.dtype)
    momentum = tensor.momentum
    if momentum is None:
        step = g * (first * alpha) * second
    else:
        momentum = beta_1 * momentum + (1 - beta_1) * (g * first * second)
        (momentum,) = ops.barrier(momentum)  # else the parameter's update would compute it again, from the old one
        step = alpha * momentum
    # One rounding, of the result: a low-precision parameter would lose part of a rounded step.
    decayed = ops.cast(x, first.dtype)
    if tensor.decays:
        decayed = decayed * tensor.decay_factor
    return tensor._replace(x=ops.cast(decayed - step, tensor.x.dtype), slots=update.slots, momentum=momentum)


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


def spread(ops: Any, statistic: Array, removed: Shape) -> Array:
    """The statistic with an axis of size 1 in place of each that it was reduced over."""
    shape = list(statistic.shape)
    for axis in removed:
        shape.insert(axis, 1)
    return ops.reshape(statistic, tuple(shape))


def _split(arrays: list[Array], count: int) -> tuple[list[Array], list[Array]]:
    return arrays[:count], arrays[count:]
