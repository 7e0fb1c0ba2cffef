"""The native kernels as XLA custom calls on CPU; ``native/xla_ffi.cpp`` is the other side of this file.

The calls are in the same shared library as the other native kernels, which ``native.py`` loads. It speaks the oldest
version of XLA's foreign function interface that has all it needs, so that one library serves every jaxlib.
"""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

import jax
import jaxlib.version
import numpy as np

from adafactor.core import native
from adafactor.core.canonical import canonical
from adafactor.core.factoring import Layout

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


def lower_measure(
    context: Any, operands: Any, *, layouts: tuple[Layout, ...], clip: bool, scale: bool, after: bool, report: bool
) -> Any:
    """The custom call, or ``None`` where `array.py` has to do it."""
    tensors = _tensors(context, layouts)
    if tensors is None:
        return None
    order, results, aliases = [0, 1], list[int](), dict[int, int]()
    at, out = 2, 0
    for layout, (_, transposed) in zip(layouts, tensors, strict=True):
        taken = list(range(at, at + 1 + scale + len(layout.slots)))
        at += len(taken)
        given = list(range(out, out + (4 if layout.factored else 1) + report))
        out += len(given)
        if transposed:  # the kernel's row is our column
            taken[-2:] = taken[:-3:-1]
            given = [given[1], given[0], given[3], given[2], *given[4:]]
        if layout.factored:  # the statistics are replaced in place
            end, first = len(order) + len(taken), len(results)
            aliases |= {end - 2: first, end - 1: first + 1}
        order += taken
        results += given
    back = [results.index(k) for k in range(out)]
    flags = {"clip": clip, "scale": scale, "scale_after_decay": after, "report": report}
    return _call("adafactor_xla_measure", context, operands, order, results, back, aliases, tensors, **flags)


def lower_step(
    context: Any,
    operands: Any,
    *,
    layouts: tuple[Layout, ...],
    clip: bool,
    scale: bool,
    momentum: bool,
) -> Any:
    """The custom call, whose results are its operands' own memory, or ``None`` where `array.py` has to do it."""
    tensors = _tensors(context, layouts)
    if tensors is None:
        return None
    order, results, aliases = [0, 1], list[int](), dict[int, int]()
    at, out = 2, 0
    for layout, (_, transposed) in zip(layouts, tensors, strict=True):
        taken = list(range(at, at + 2 + len(layout.slots) + momentum))
        at += len(taken)
        given = list(range(out, out + len(taken) - 1))
        out += len(given)
        if transposed:
            taken[2], taken[3] = taken[3], taken[2]
            given[1], given[2] = given[2], given[1]
        aliases |= {len(order) + 1 + k: len(results) + k for k in range(len(given))}
        order += taken
        results += given
    back = [results.index(k) for k in range(out)]
    flags = {"clip": clip, "scale": scale, "momentum": momentum}
    return _call("adafactor_xla_step", context, operands, order, results, back, aliases, tensors, **flags)


def _tensors(context: Any, layouts: tuple[Layout, ...]) -> list[tuple[list[int], bool]] | None:
    """Each tensor in the kernels' words, and whether its rows act as their columns."""
    if not _one_device(context) or why_not() is not None:
        return None
    if any(str(aval.dtype) not in native.DTYPES for aval in context.avals_in):
        return None
    forms = [canonical(layout) for layout in layouts]
    words = []
    for form in forms:
        if form is None or not form.size:
            return None
        words.append(
            ([int(form.factored), form.outer, form.rows, form.inner, form.columns, form.slices], form.transposed)
        )
    return words


def _one_device(context: Any) -> bool:
    """A custom call inside a partitioned program would have its operands gathered."""
    axes = context.module_context.axis_context
    manual = getattr(axes, "manual_axes", None)
    if manual is not None:
        return set(manual) == set(axes.mesh.axis_names)  # inside shard_map: the arrays are this device's
    return getattr(axes, "num_devices", None) == 1


def _call(
    name: str,
    context: Any,
    operands: Any,
    order: list[int],
    results: list[int],
    back: list[int],
    aliases: dict[int, int],
    tensors: list[tuple[list[int], bool]],
    **flags: bool,
) -> Any:
    """Calls with operands and results in the kernel's order, and gives the results in ours."""
    lower = jax.ffi.ffi_lowering(name, operand_output_aliases=aliases)
    ordered = context.replace(
        avals_in=[context.avals_in[k] for k in order], avals_out=[context.avals_out[k] for k in results]
    )
    _library().adafactor_xla_configure(ctypes.c_int64(native.threads()), ctypes.c_int64(native.isa()))
    out = lower(
        ordered,
        *(operands[k] for k in order),
        tensors=np.array([words for words, _ in tensors], np.int64).ravel(),
        **flags,
    )
    return [out[k] for k in back]
