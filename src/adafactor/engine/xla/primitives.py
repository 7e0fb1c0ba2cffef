"""Measure and step under JAX: one primitive each, which every platform lowers as it does best.

On CPU a primitive becomes a call of the native kernels, if they are built and one device holds the arrays; anywhere
else, and for a layout that the native kernels do not know, it becomes ``arrays.py`` on ``jax.numpy``. The choice is
made when a function is lowered, so that the same jitted function serves a CPU and an accelerator. Both are exact;
``vmap`` adds a batch axis to the layout and stays with one call.

In ``arrays.py`` the rows, the columns and the update each read g². XLA would compute it once and keep it (or g cast
to float32), a temporary as large as the parameter; behind a barrier each read squares g again, in registers.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial, wraps
from importlib import import_module
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from adafactor.core.factoring import Layout
from adafactor.engine.xla import arrays, custom_call
from adafactor.engine.xla.arrays import Settings, Tensor


def barrier(*arrays: jax.Array) -> tuple[jax.Array, ...]:
    """The arrays themselves; the compiler computes nothing on their far side from their near side."""
    behind: tuple[jax.Array, ...] = jax.lax.optimization_barrier(arrays)
    return behind


ops = arrays.functions(jnp, rsqrt=jax.lax.rsqrt, cast=jax.lax.convert_element_type, barrier=barrier)


def enable_x64() -> Any:
    """A context in which float64 stays float64. Before JAX 0.8 it has another place."""
    return (jax if hasattr(jax, "enable_x64") else import_module("jax.experimental")).enable_x64(True)


jax.tree_util.register_pytree_node(Layout, lambda layout: ((), layout), lambda layout, _: layout)
jax.tree_util.register_dataclass(
    arrays.Constants, ["epsilon_1", "epsilon_2", "clip_threshold", "beta_1"], ["scale_parameter"]
)
jax.tree_util.register_dataclass(Settings, ["hp", "ema_weight", "rho"], ["scale_after_decay", "diagnostics"])


class Measured(NamedTuple):
    """A step short of making it, and its diagnostics where they are asked for.

    The latter have the lengths of the batch axes and 3: RMS(u) before clipping (eq. 7), what clipping divides by
    (eq. 10) and the parameter scale (eq. 9).
    """

    update: arrays.Update
    diagnostics: jax.Array | None = None


def measure(tensors: Sequence[Tensor], settings: Settings) -> list[Measured]:
    """The step of every tensor short of making it (eqs. 1 to 11)."""
    results: list[Measured | None] = [None] * len(tensors)
    for group, numbers, decay_factors, flags in _groups(tensors, settings):
        operands = [a for k in group for a in (tensors[k].g, tensors[k].x, *_slots(tensors[k]))]
        out = iter(measure_p.bind(numbers, decay_factors, *operands, **flags))
        for k in group:
            count = (5 if tensors[k].layout.factored else 3) + settings.diagnostics
            results[k] = _measured(tensors[k], [next(out) for _ in range(count)], settings)
    return results  # type: ignore[return-value]


def compiled_alone(function: Callable[..., Any], static: tuple[int, ...] = ()) -> Callable[..., Any]:
    """The function, with a compiled form of its own where nothing is traced: not one for each of its operations."""
    compiled = jax.jit(function, static_argnums=static)

    @wraps(function)
    def call(*arguments: Any) -> Any:
        traced = any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(arguments))
        return (function if traced else compiled)(*arguments)

    return call


@compiled_alone
def _measured(tensor: Tensor, out: list[jax.Array], settings: Settings) -> Measured:
    count = 5 if tensor.layout.factored else 3
    update = arrays.measured(ops, tensor, out[:count], settings.hp.epsilon_1)
    return Measured(update, out[count] if settings.diagnostics else None)


def step(tensors: Sequence[Tensor], settings: Settings) -> list[tuple[Tensor, jax.Array | None]]:
    """The whole step (eqs. 1 to 13): tensors with new x, slots and momentum, in place where they are donated.

    Beside each its diagnostics, as in `Measured`, where they are asked for.
    """
    results: list[tuple[Tensor, jax.Array | None] | None] = [None] * len(tensors)
    momentum = any(tensor.momentum is not None for tensor in tensors)
    for group, numbers, decay_factors, flags in _groups(tensors, settings):
        operands = [a for k in group for a in _written(tensors[k])]
        out = iter(step_p.bind(numbers, decay_factors, *operands, momentum=momentum, **flags))
        for k in group:
            x, slots = next(out), {name: next(out) for name in tensors[k].layout.slots}
            moved = tensors[k]._replace(x=x, slots=slots, momentum=next(out) if momentum else None)
            results[k] = moved, next(out) if settings.diagnostics else None
    return results  # type: ignore[return-value]


# -- operands ----------------------------------------------------------------------------------------------------------


def _groups(
    tensors: Sequence[Tensor], settings: Settings
) -> Iterator[tuple[list[int], jax.Array, jax.Array, dict[str, Any]]]:
    """Tensors of one dtype of statistics, with or without a form for the kernels: which, and what they share."""
    hp = settings.hp
    groups: dict[Any, list[int]] = {}
    for k, tensor in enumerate(tensors):
        kind = tensor.dtype, custom_call.words_of(tensor.layout) is None, _place(tensor)
        groups.setdefault(kind, []).append(k)
    for (dtype, *_), group in groups.items():
        clip = 1.0 if hp.clip_threshold is None else hp.clip_threshold  # nobody reads it where clipping is off
        beta_1 = 0.0 if hp.beta_1 is None else hp.beta_1
        values = (settings.ema_weight, settings.rho, hp.epsilon_1, hp.epsilon_2, clip, beta_1)
        flags = {
            "layouts": tuple(tensors[k].layout for k in group),
            "clip": hp.clip_threshold is not None,
            "scale": hp.scale_parameter,
            "scale_after_decay": settings.scale_after_decay,
            "diagnostics": settings.diagnostics,
        }
        yield group, _packed(values, dtype), _packed([tensors[k].decay_factor for k in group], dtype), flags


def _place(tensor: Tensor) -> Any:
    """Which tensors a compiled function may have in common outside jit: of one place, where the kernels are.

    A long program of anything else takes long to compile, and equal layouts can share a short one.
    """
    if isinstance(tensor.x, jax.core.Tracer) or not isinstance(tensor.x, jax.Array):
        return None
    native = all(device.platform == "cpu" for device in tensor.x.devices()) and custom_call.why_not() is None
    return tensor.x.sharding if native else id(tensor)


def _packed(values: Sequence[Any], dtype: Any) -> jax.Array:
    """Numbers, known or traced, as one array; the same one is converted once."""
    if all(isinstance(value, int | float) for value in values):
        return jnp.asarray(np.array(values, dtype))
    distinct = {id(value): value for value in values}
    indices = {key: index for index, key in enumerate(distinct)}
    packed = jnp.stack([jnp.asarray(value, dtype) for value in distinct.values()])
    return packed if len(indices) == len(values) else packed[np.array([indices[id(value)] for value in values])]


def _slots(tensor: Tensor) -> list[jax.Array]:
    return [tensor.slots[name] for name in tensor.layout.slots]


def _written(tensor: Tensor) -> list[jax.Array]:
    return [tensor.g, tensor.x, *_slots(tensor), *([] if tensor.momentum is None else [tensor.momentum])]


def _number_of(values: jax.Array, k: int, rank: int) -> jax.Array:
    """Number ``k`` of a head: a scalar, or under vmap broadcasting to a tensor of ``rank``."""
    lead = values.shape[:-1]
    return values[..., k].reshape(lead + (1,) * (rank - len(lead)) if lead else ())


def _settings(numbers: jax.Array, rank: int, flags: dict[str, bool]) -> Settings:
    """The settings of a tensor of ``rank`` axes, from the first operand of a primitive."""
    weight, rho, *constants = (_number_of(numbers, k, rank) for k in range(6))
    epsilon_1, epsilon_2, clip, beta_1 = constants
    hp = arrays.Constants(epsilon_1, epsilon_2, clip if flags["clip"] else None, beta_1, flags["scale"])
    return Settings(hp, weight, rho, flags["scale_after_decay"], flags["diagnostics"])


# -- the primitives on jax.numpy ---------------------------------------------------------------------------------------


def _measure_jnp(*operands: jax.Array, layouts: tuple[Layout, ...], **flags: bool) -> list[jax.Array]:
    out = []
    for tensor, settings in _unpacked(operands, layouts, False, flags):
        layout, update, slices = tensor.layout, arrays.measure(ops, tensor, settings), _slices(tensor.layout)
        first, second = update.direction
        if layout.factored:
            out += [update.slots["row"], update.slots["column"]]
            out += [first.reshape(layout.row_shape), second.reshape(layout.column_shape)]
        else:
            out += [jnp.broadcast_to(settings.ema_weight, slices), jnp.broadcast_to(second, slices)]
        out.append(jnp.broadcast_to(update.alpha, slices))
        if settings.diagnostics:
            out.append(arrays.diagnosed(ops, update, layout))
    return out


def _step_jnp(*operands: jax.Array, layouts: tuple[Layout, ...], momentum: bool, **flags: bool) -> list[jax.Array]:
    out = []
    for tensor, settings in _unpacked(operands, layouts, momentum, flags):
        update = arrays.measure(ops, tensor, settings)
        moved = arrays.apply(ops, tensor, update, settings.hp.beta_1)
        out += [moved.x, *_slots(moved), *([] if moved.momentum is None else [moved.momentum])]
        if settings.diagnostics:
            out.append(arrays.diagnosed(ops, update, tensor.layout))
    return out


def _unpacked(
    operands: Sequence[jax.Array], layouts: tuple[Layout, ...], momentum: bool, flags: dict[str, bool]
) -> Iterator[tuple[Tensor, Settings]]:
    """The operands of a primitive, tensor by tensor."""
    numbers, decay_factors, *rest = operands
    following = iter(rest)
    for k, layout in enumerate(layouts):
        g, x, *slots = (next(following) for _ in range(2 + len(layout.slots)))
        average, rank = next(following) if momentum else None, len(layout.shape)
        own = dict(zip(layout.slots, slots, strict=True))
        tensor = Tensor(layout, x, g, own, _number_of(decay_factors, k, rank), average)
        yield tensor, _settings(numbers, rank, flags)


def _slices(layout: Layout) -> tuple[int, ...]:
    """One value per slice, in a shape that broadcasts to the parameter."""
    return tuple(n if axis in layout.batch else 1 for axis, n in enumerate(layout.shape))


# -- their results -----------------------------------------------------------------------------------------------------


def _measured_shapes(avals: Sequence[Any], layouts: tuple[Layout, ...], **flags: bool) -> list[Any]:
    dtype, out = avals[0].dtype, list[tuple[int, ...]]()
    for layout in layouts:
        factors = [layout.row_shape, layout.column_shape]
        out += [*factors, *factors] if layout.factored else [_slices(layout)] * 2
        out.append(_slices(layout))
        if flags["diagnostics"]:
            out.append((*(layout.shape[axis] for axis in layout.batch), 3))
    return [jax.core.ShapedArray(shape, dtype) for shape in out]


def _stepped_shapes(
    avals: Sequence[Any], layouts: tuple[Layout, ...], momentum: bool, diagnostics: bool, **flags: bool
) -> list[Any]:
    out, rest = [], iter(avals[2:])
    for layout in layouts:
        next(rest)  # the gradient
        out += [next(rest) for _ in range(1 + len(layout.slots) + momentum)]
        if diagnostics:
            out.append(jax.core.ShapedArray((*(layout.shape[axis] for axis in layout.batch), 3), avals[0].dtype))
    return out


# -- the primitives as custom calls ------------------------------------------------------------------------------------


def _pieces_to_measure(layouts: tuple[Layout, ...], **flags: bool) -> Iterator[custom_call.Piece | None]:
    """Each tensor's part of a call of measure; ``None`` for one that the kernels have no form for."""
    argument, result = 2, 0
    for k, layout in enumerate(layouts):
        arguments = list(range(argument, argument := argument + 2 + len(layout.slots)))
        count = (5 if layout.factored else 3) + flags["diagnostics"]
        results, aliases = list(range(result, result := result + count)), {}
        form = custom_call.words_of(layout)
        if form is None:
            yield None
            continue
        words, transposed = form
        if layout.factored:  # the statistics are replaced in place
            aliases = {2: 0, 3: 1}
            if transposed:  # the kernel's row is our column
                arguments[2:4] = arguments[3], arguments[2]
                results[:4] = results[1], results[0], results[3], results[2]
        yield custom_call.Piece((*words, k), arguments, results, aliases, layout.size)


def _pieces_to_step(layouts: tuple[Layout, ...], momentum: bool, **flags: bool) -> Iterator[custom_call.Piece | None]:
    """Each tensor's part of a call of step, which overwrites all but the gradient."""
    argument, result = 2, 0
    for k, layout in enumerate(layouts):
        written = 1 + len(layout.slots) + momentum
        arguments = list(range(argument, argument := argument + 1 + written))
        results = list(range(result, result := result + written + flags["diagnostics"]))
        form = custom_call.words_of(layout)
        if form is None:
            yield None
            continue
        words, transposed = form
        if transposed:
            arguments[2:4] = arguments[3], arguments[2]
            results[1:3] = results[2], results[1]
        yield custom_call.Piece((*words, k), arguments, results, {1 + r: r for r in range(written)}, layout.size)


# -- the primitives ----------------------------------------------------------------------------------------------------

#: The lowering reads the program around it, so that it cannot stand in a function of its own.
_INLINE: dict[str, Any] = (
    {"cacheable": False} if "cacheable" in inspect.signature(mlir.register_lowering).parameters else {}
)


def _primitive(name: str, on_jnp: Callable[..., list[jax.Array]], pieces_of: Any, shapes_of: Any) -> Primitive:
    """A primitive with two operands of numbers before the tensors' arrays."""
    primitive = Primitive(name)
    primitive.multiple_results = True
    compiled = cache(lambda **params: jax.jit(partial(primitive.bind, **params)))
    lower_jnp = mlir.lower_fun(on_jnp, multiple_results=True)

    def lower(context: Any, *operands: Any, **params: Any) -> Any:
        if not custom_call.can_lower(context):
            return lower_jnp(context, *operands, **params)
        pieces = list(pieces_of(**params))
        if None in pieces:
            return lower_jnp(context, *operands, **params)
        flags = {key: value for key, value in params.items() if key != "layouts"}
        made = custom_call.lower(name.replace("_", "_xla_"), context, operands, pieces, flags)
        return [made[k] for k in range(len(context.avals_out))]

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

    def run(*operands: Any, **params: Any) -> Any:
        # Without jit, and where JAX looks for a NaN, every operation runs by itself: the one at fault has a name.
        by_operation = ("jax_disable_jit", "jax_debug_nans", "jax_debug_infs")
        if any(getattr(jax.config, name) for name in by_operation):
            return on_jnp(*operands, **params)
        return compiled(**params)(*operands)

    primitive.def_impl(run)
    primitive.def_abstract_eval(lambda *avals, **params: shapes_of(avals, **params))
    mlir.register_lowering(primitive, lower, **_INLINE)
    batching.primitive_batchers[primitive] = batch
    ad.primitive_jvps[primitive] = differentiate
    return primitive


def _stacked(layout: Layout, size: int) -> Layout:
    """The layout of ``size`` such parameters in one: each a slice of its own."""
    rows, columns, batch = (tuple(axis + 1 for axis in axes) for axes in (layout.rows, layout.columns, layout.batch))
    return Layout((size, *layout.shape), rows, columns, (0, *batch))


measure_p = _primitive("adafactor_measure", _measure_jnp, _pieces_to_measure, _measured_shapes)
step_p = _primitive("adafactor_step", _step_jnp, _pieces_to_step, _stepped_shapes)
