"""Measure and step under JAX: one primitive each, which every platform lowers as it does best.

On CPU a primitive becomes a call of the native kernels, if they are built and one device holds the arrays; anywhere
else, and for a layout that the native kernels do not know, it becomes ``arrays.py`` on ``jax.numpy``. The choice is
made when a function is lowered, so that the same jitted function serves a CPU and an accelerator. Both are exact;
``vmap`` adds a batch axis to the layout and stays with one call.

In ``arrays.py`` the rows, the columns and the update each read g². XLA would compute it once and keep it (or g cast
to float32), a temporary as large as the parameter; behind a barrier each read squares g again, in registers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from adafactor.core.canonical import canonical
from adafactor.core.factoring import Layout
from adafactor.core.hyperparameters import Hyperparameters
from adafactor.engine.xla import arrays, custom_call

_NAMES = ("absolute", "maximum", "minimum", "power", "reshape", "sqrt", "square", "sum", "where")

ops = SimpleNamespace(
    **{name: getattr(jnp, name) for name in _NAMES}, rsqrt=jax.lax.rsqrt, cast=jax.lax.convert_element_type
)

#: Large tensors get a call each, so that a gradient can be freed as soon as it is used; small ones share one.
LARGE = 1 << 16


def barrier(*arrays: jax.Array) -> tuple[jax.Array, ...]:
    """The arrays themselves; the compiler computes nothing on their far side from their near side."""
    behind: tuple[jax.Array, ...] = jax.lax.optimization_barrier(arrays)
    return behind


class Tensor(NamedTuple):
    """One parameter in one update: arrays of ``layout.shape``, statistics by the names of ``Layout.slots``.

    ``keep`` is what the parameter is multiplied by before its step, ``momentum`` as in eq. 12 (`step` only).
    """

    layout: Layout
    x: jax.Array
    g: jax.Array
    slots: dict[str, jax.Array]
    keep: jax.Array | float = 1.0
    momentum: jax.Array | None = None


class Measured(NamedTuple):
    """New statistics by name, and two factors whose product with g is what x loses (eqs. 9, 10, 13).

    ``report``, where asked for, has the lengths of the batch axes and 3: RMS(u) before clipping (eq. 7), what clipping
    divides by (eq. 10) and the parameter scale (eq. 9).
    """

    slots: dict[str, jax.Array]
    first: jax.Array
    second: jax.Array
    report: jax.Array | None = None


def measure(
    tensors: Sequence[Tensor],
    hp: Hyperparameters,
    decay: jax.Array,
    rho: jax.Array,
    scale_after_decay: bool = False,
    report: bool = False,
) -> list[Measured]:
    """The step of every tensor short of making it (eqs. 1 to 11); ``decay`` and ``rho`` are scalars.

    ``scale_after_decay`` takes RMS(x) of the parameter times its ``keep``, as Keras does; ``report`` asks for
    ``Measured.report``.
    """
    results: list[Measured | None] = [None] * len(tensors)
    flags = {"clip": hp.clip_threshold is not None, "scale": hp.scale_parameter}
    flags |= {"after": scale_after_decay, "report": report}
    for group in _groups(tensors):
        dtype = _statistics(tensors[group[0]])
        numbers, keeps = _numbers(dtype, hp, decay, rho), _keeps([tensors[k] for k in group], dtype)
        layouts = tuple(tensors[k].layout for k in group)
        operands = [a for k in group for a in _read(tensors[k], hp.scale_parameter)]
        out = iter(measure_p.bind(numbers, keeps, *operands, layouts=layouts, **flags))
        for k in group:
            results[k] = _measured(tensors[k], hp, decay, out, report)
    return results  # type: ignore[return-value]


def _measured(
    tensor: Tensor, hp: Hyperparameters, decay: jax.Array, out: Iterator[jax.Array], report: bool
) -> Measured:
    layout = tensor.layout
    if layout.factored:
        row, column, first, second = (next(out) for _ in range(4))
        return Measured(
            {"row": row, "column": column},
            arrays._spread(ops, first, layout.columns),
            arrays._spread(ops, second, layout.rows),
            next(out) if report else None,
        )
    second = next(out)
    v = tensor.slots["second_moment"]
    decay = decay.astype(v.dtype)
    v = (1 - decay) * v + decay * (jnp.square(tensor.g.astype(v.dtype)) + hp.epsilon_1)  # eq. 11
    return Measured({"second_moment": v}, arrays._inverse_sqrt(ops, v), second, next(out) if report else None)


def step(tensors: Sequence[Tensor], hp: Hyperparameters, decay: jax.Array, rho: jax.Array) -> list[Tensor]:
    """The whole step (eqs. 1 to 13): the tensors with new x, slots and momentum, donated arrays updated in place."""
    results: list[Tensor | None] = [None] * len(tensors)
    flags = {"clip": hp.clip_threshold is not None, "scale": hp.scale_parameter}
    momentum = hp.momentum is not None
    for group in _groups(tensors):
        dtype = _statistics(tensors[group[0]])
        numbers, keeps = _numbers(dtype, hp, decay, rho), _keeps([tensors[k] for k in group], dtype)
        operands = [a for k in group for a in _written(tensors[k])]
        layouts = tuple(tensors[k].layout for k in group)
        out = iter(step_p.bind(numbers, keeps, *operands, layouts=layouts, momentum=momentum, **flags))
        for k in group:
            x, slots = next(out), {name: next(out) for name in tensors[k].layout.slots}
            average = next(out) if momentum else None
            results[k] = tensors[k]._replace(x=x, slots=slots, momentum=average)
    return results  # type: ignore[return-value]


# -- operands ----------------------------------------------------------------------------------------------------------


def _groups(tensors: Sequence[Tensor]) -> list[list[int]]:
    groups: dict[object, list[int]] = {}
    for k, tensor in enumerate(tensors):
        alone = tensor.layout.size >= LARGE or canonical(tensor.layout) is None
        groups.setdefault(k if alone else _statistics(tensor), []).append(k)
    return list(groups.values())


def _statistics(tensor: Tensor) -> Any:
    return next(iter(tensor.slots.values())).dtype


def _numbers(dtype: Any, hp: Hyperparameters, decay: jax.Array, rho: jax.Array) -> jax.Array:
    clip = 1.0 if hp.clip_threshold is None else hp.clip_threshold  # nobody reads it where clipping is off
    values = (decay, rho, hp.epsilon_1, hp.epsilon_2, clip, hp.momentum or 0.0 if not _traced(hp.beta_1) else hp.beta_1)
    return jnp.stack([jnp.asarray(value, dtype) for value in values])


def _keeps(tensors: Sequence[Tensor], dtype: Any) -> jax.Array:
    return jnp.stack([jnp.asarray(tensor.keep, dtype) for tensor in tensors])


def _traced(value: object) -> bool:
    return isinstance(value, jax.Array)


def _read(tensor: Tensor, scale: bool) -> list[jax.Array]:
    return [tensor.g, *([tensor.x] if scale else []), *(tensor.slots[name] for name in tensor.layout.slots)]


def _written(tensor: Tensor) -> list[jax.Array]:
    slots = [tensor.slots[name] for name in tensor.layout.slots]
    return [tensor.g, tensor.x, *slots, *([] if tensor.momentum is None else [tensor.momentum])]


def _number_of(values: jax.Array, k: int, rank: int) -> jax.Array:
    """Number ``k`` of a head: a scalar, or under vmap broadcasting to a tensor of ``rank``."""
    lead = values.shape[:-1]
    return values[..., k].reshape(lead + (1,) * (rank - len(lead)) if lead else ())


def _constants(
    numbers: jax.Array, rank: int, clip: bool, scale: bool
) -> tuple[jax.Array, jax.Array, arrays.Constants, Any]:
    """decay, rho, the other constants and beta_1."""
    one = [_number_of(numbers, k, rank) for k in range(6)]
    return one[0], one[1], arrays.Constants(one[2], one[3], one[4] if clip else None, scale), one[5]


# -- the primitives on jax.numpy ---------------------------------------------------------------------------------------


def _measure_jnp(
    numbers: jax.Array,
    keeps: jax.Array,
    *operands: jax.Array,
    layouts: tuple[Layout, ...],
    clip: bool,
    scale: bool,
    after: bool,
    report: bool,
) -> list[jax.Array]:
    rest = iter(operands)
    out = []
    for k, layout in enumerate(layouts):
        g = next(rest)
        x = next(rest) if scale else g
        slots = {name: next(rest) for name in layout.slots}
        decay, rho, hp, _ = _constants(numbers, len(layout.shape), clip, scale)
        keep = _number_of(keeps, k, len(layout.shape)) if after else None
        update = arrays.measure(ops, x, g, slots, layout, hp, decay, rho, keep, barrier, report)
        first, second = update.direction
        if layout.factored:
            first = first * update.alpha  # second * alpha may overflow where a column had no gradient: 0 * inf
            out += [update.slots["row"], update.slots["column"]]
            out += [first.reshape(layout.row_shape), second.reshape(layout.column_shape)]
        else:
            slices = tuple(n if axis in layout.batch else 1 for axis, n in enumerate(layout.shape))
            out.append(jnp.broadcast_to(second * update.alpha, slices))
        if report:
            out.append(reported(update, layout))
    return out


def reported(update: arrays.Update, layout: Layout) -> jax.Array:
    """``Measured.report`` of an update."""
    assert update.report is not None
    rms_u = update.report[0]
    columns = [jnp.broadcast_to(jnp.asarray(a, rms_u.dtype), rms_u.shape) for a in update.report]
    return jnp.stack(columns, axis=-1).reshape(*(rms_u.shape[axis] for axis in layout.batch), 3)


def _step_jnp(
    numbers: jax.Array,
    keeps: jax.Array,
    *operands: jax.Array,
    layouts: tuple[Layout, ...],
    clip: bool,
    scale: bool,
    momentum: bool,
) -> list[jax.Array]:
    rest = iter(operands)
    out = []
    for k, layout in enumerate(layouts):
        g, x, slots = next(rest), next(rest), {name: next(rest) for name in layout.slots}
        average = next(rest) if momentum else None
        rank = len(layout.shape)
        decay, rho, hp, beta_1 = _constants(numbers, rank, clip, scale)
        keep = _number_of(keeps, k, rank)
        update = arrays.measure(ops, x, g, slots, layout, hp, decay, rho, None, barrier)
        x, average = arrays.apply(ops, x, g, update, average, beta_1 if momentum else None, keep, barrier)
        out += [x, *(update.slots[name] for name in layout.slots), *([] if average is None else [average])]
    return out


# -- the primitives ----------------------------------------------------------------------------------------------------


def _primitive(name: str, on_jnp: Callable[..., list[jax.Array]], lower_native: Any) -> Primitive:
    """A primitive with two operands of numbers before the tensors' arrays."""
    primitive = Primitive(name)
    primitive.multiple_results = True
    compiled = cache(lambda **params: jax.jit(partial(primitive.bind, **params)))
    shapes = cache(lambda avals, **params: jax.make_jaxpr(partial(on_jnp, **params))(*avals).out_avals)
    lower_jnp = mlir.lower_fun(on_jnp, multiple_results=True)

    def lower_cpu(context: Any, *operands: Any, **params: Any) -> Any:
        native = lower_native(context, operands, **params)
        return lower_jnp(context, *operands, **params) if native is None else native

    def batch(operands: Any, axes: Any, **params: Any) -> Any:
        size = next(a.shape[axis] for a, axis in zip(operands, axes, strict=True) if axis is not None)
        moved = []
        for k, (a, axis) in enumerate(zip(operands, axes, strict=True)):
            if axis is not None:
                moved.append(jnp.moveaxis(a, axis, 0))
            elif k < 2 and axes[0] is axes[1] is None and a.ndim == 1:
                moved.append(a)  # one set of numbers serves all models
            else:
                moved.append(jnp.broadcast_to(a, (size, *a.shape)))
        layouts = tuple(_stacked(layout, size) for layout in params.pop("layouts"))
        out = primitive.bind(*moved, layouts=layouts, **params)
        return out, [0] * len(out)

    def differentiate(primals: Any, tangents: Any, **params: Any) -> Any:
        tangents = [ad.instantiate_zeros(t) for t in tangents]
        return jax.jvp(partial(on_jnp, **params), tuple(primals), tuple(tangents))

    primitive.def_impl(lambda *operands, **params: compiled(**params)(*operands))
    primitive.def_abstract_eval(lambda *avals, **params: list(shapes(avals, **params)))
    mlir.register_lowering(primitive, lower_jnp)
    mlir.register_lowering(primitive, lower_cpu, platform="cpu")
    batching.primitive_batchers[primitive] = batch
    ad.primitive_jvps[primitive] = differentiate
    return primitive


def _stacked(layout: Layout, size: int) -> Layout:
    """The layout of ``size`` such parameters in one: each a slice of its own."""
    rows, columns, batch = (tuple(axis + 1 for axis in axes) for axes in (layout.rows, layout.columns, layout.batch))
    return Layout((size, *layout.shape), rows, columns, (0, *batch))


measure_p = _primitive("adafactor_measure", _measure_jnp, custom_call.lower_measure)
step_p = _primitive("adafactor_step", _step_jnp, custom_call.lower_step)
