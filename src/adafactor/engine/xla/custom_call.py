"""The native kernels as XLA custom calls on CPU; ``native/xla_ffi.cpp`` is the other side of this file.

The calls are in the same shared library as the other native kernels, which ``native.py`` loads. It speaks the oldest
version of XLA's foreign function interface that has all it needs, so that one library serves every jaxlib.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import jax
import jaxlib.version
import numpy as np
from jaxlib.mlir import ir

from adafactor.core import native
from adafactor.core.canonical import canonical
from adafactor.core.factoring import Layout
from adafactor.engine.xla import ordering

_CALLS = ("adafactor_xla_measure", "adafactor_xla_step")


def why_not() -> str | None:
    """One sentence that says why JAX does not use the native kernels on CPU, or ``None`` where it does."""
    return native.why_not() or _register()


def _library() -> ctypes.CDLL:
    return ctypes.CDLL(native.info().path)


@cache
def _register() -> str | None:
    library = _library()
    for name in (*_CALLS, "adafactor_xla_configure"):
        if not hasattr(library, name):
            return f"The native kernels at {native.info().path} lack {name}. Install adafactor again."
    try:
        # A target that is registered before the client is there may be refused when it starts, which then fails.
        jax.local_devices(backend="cpu")
        for name in _CALLS:
            jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(getattr(library, name)), platform="cpu")
    except RuntimeError as refusal:
        reason = str(refusal).splitlines()[0].rstrip(".")
        return f"jaxlib {jaxlib.version.__version__} does not take the native kernels: {reason}."
    return None


class Piece(NamedTuple):
    """One tensor of a call, by the numbers of its operands and results in the primitive.

    Attributes:
        words: what the call is told of the tensor's form, and its number among the primitive's tensors.
        arguments, results: those of the call, in the kernel's order; gradient and parameter come first.
        aliases: which argument's memory which result takes, by their places in these lists.
        size: elements of the parameter.
    """

    words: tuple[int, ...]
    arguments: list[int]
    results: list[int]
    aliases: dict[int, int]
    size: int


#: Large tensors get a call each, so that a gradient can be freed as soon as it is used; small ones share one.
LARGE = 1 << 16
#: How many. The time in which XLA compiles a call grows with the square of its operands.
MOST = 32


def words_of(layout: Layout) -> tuple[tuple[int, ...], bool] | None:
    """A layout in the kernels' words, and whether its rows act as their columns; ``None`` where it has no form."""
    form = canonical(layout)
    if form is None or not form.size:
        return None
    return (int(form.factored), form.outer, form.rows, form.inner, form.columns, form.slices), form.transposed


def can_lower(context: Any) -> bool:
    """Whether this function may hold custom calls: it is for this machine's CPU and for arrays on one device."""
    module = context.module_context
    exported = getattr(getattr(module, "lowering_parameters", None), "for_export", False)
    if tuple(module.platforms) != ("cpu",) or exported or not _one_device(context) or why_not() is not None:
        return False
    return all(str(aval.dtype) in native.DTYPES for aval in context.avals_in)


def _one_device(context: Any) -> bool:
    """A custom call inside a partitioned program would have its operands gathered."""
    axes = context.module_context.axis_context
    manual = getattr(axes, "manual_axes", None)
    if manual is not None:
        return set(manual) == set(axes.mesh.axis_names)  # inside shard_map: the arrays are this device's
    return getattr(axes, "num_devices", None) == 1


def lower(name: str, context: Any, operands: Any, pieces: Sequence[Piece], flags: dict[str, bool]) -> dict[int, Any]:
    """The results of the primitive by their numbers, from as many calls as serve best.

    The first two operands, the numbers and the factors of weight decay of all tensors, go to every call.
    """
    _library().adafactor_xla_configure(ctypes.c_int64(native.threads()), ctypes.c_int64(native.isa()))
    calls = [[piece] for piece in pieces if piece.size >= LARGE]
    small = [piece for piece in pieces if piece.size < LARGE]
    calls += [small[k : k + MOST] for k in range(0, len(small), MOST)]
    writers = [ordering.Writer(*([operands[piece.arguments[k]] for piece in call] for k in (1, 0))) for call in calls]
    made: dict[int, Any] = {}
    for call, tokens in zip(calls, ordering.waits(writers), strict=True):
        arguments, results, aliases = [0, 1], list[int](), dict[int, int]()
        for piece in call:
            aliases |= {len(arguments) + k: len(results) + r for k, r in piece.aliases.items()}
            arguments += piece.arguments
            results += piece.results
        avals = [context.avals_in[k] for k in arguments]
        avals += [jax.core.ShapedArray(ir.RankedTensorType(token.type).shape, np.float32) for token in tokens]
        call_context = context.replace(avals_in=avals, avals_out=[context.avals_out[k] for k in results])
        out = jax.ffi.ffi_lowering(name, operand_output_aliases=aliases)(
            call_context,
            *(operands[k] for k in arguments),
            *tokens,
            tensors=np.array([piece.words for piece in call], np.int64).ravel(),
            **flags,
        )
        made |= dict(zip(results, out, strict=True))
    return made
