"""The native measure inside what TensorFlow has XLA compile (``jit_compile=True``) on a CPU.

XLA knows no op of others, but custom calls: ``adafactor_xla_measure`` of ``native/xla_ffi.cpp``, the one that JAX
calls, registered with TensorFlow's own copy of XLA. Only measure is the kernel's. XLA moves the parameters itself: a
call that wrote them in place would have it copy every one of them first.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import tensorflow as tf

from adafactor.core import native
from adafactor.core.canonical import Canonical, canonical
from adafactor.core.hyperparameters import Hyperparameters
from adafactor.engine.tensorflow import op
from adafactor.engine.tensorflow.op import Operand, Tensor

_CALL = "adafactor_xla_measure"
_MLIR = {"float32": "f32", "float64": "f64", "bfloat16": "bf16", "float16": "f16"}
#: Of XlaCallModule; the oldest TensorFlow that has the custom calls takes 5 to 9.
_VERSION = 9


def why_not() -> str | None:
    """One sentence that says why a step that XLA compiles on a CPU has no native kernels, or ``None``."""
    return op.why_not() or _register()


def measure(
    operands: Sequence[Operand], hp: Hyperparameters, learning_rate: Tensor, ema_weight: Tensor, rho: Tensor
) -> list[tuple[Tensor, list[Tensor], Tensor | None]]:
    """What ``op.step`` computes before it moves anything, traced for XLA. The arguments are its.

    Returns:
        For each, in the dtype of the statistics, what weight decay multiplies x by; what the kernels give: row, column,
        their factors and the step size, or if unfactored 1 - beta(t), the second factor and the step size; and its
        diagnostics.
    """
    statistics = next(iter(operands[0].slots.values())).dtype
    clip = np.inf if hp.clip_threshold is None else hp.clip_threshold
    constants = tf.constant([hp.epsilon_1, hp.epsilon_2, clip, 0.0], tf.float64)
    numbers = tf.concat([tf.stack([ema_weight, rho]), constants], 0)
    decays = tf.constant([o.weight_decay for o in operands], tf.float64)
    factors = tf.cast(1 - learning_rate * decays, statistics)
    forms = [form for operand in operands if (form := canonical(operand.layout)) is not None]
    arguments: list[Any] = [tf.cast(numbers, statistics), factors]
    results: list[tuple[tuple[int, ...], Any]] = []
    aliases: dict[int, int] = {}
    for operand, form in zip(operands, forms, strict=True):
        names, slices = [name for name in form.slots if name], (_slices(operand), statistics)
        arguments += [operand.g, operand.x]
        if form.factored:  # the statistics are replaced in place
            aliases |= {len(arguments) + k: len(results) + k for k in range(2)}
            results += [(operand.layout.slots[name], statistics) for name in (*names, *names)]
        else:
            results += [slices, slices]
        results.append(slices)
        arguments += [operand.slots[name] for name in names]
        if operand.diagnostics is not None:
            results.append((operand.diagnostics.shape, statistics))
    out = iter(_call(arguments, results, aliases, forms, hp, operands[0].diagnostics is not None))
    measured = []
    for k, (operand, form) in enumerate(zip(operands, forms, strict=True)):
        values = [next(out) for _ in range(5 if form.factored else 3)]
        if form.transposed:  # the kernel's row is our column
            values[:4] = values[1], values[0], values[3], values[2]
        measured.append((factors[k], values, None if operand.diagnostics is None else next(out)))
    return measured


def _slices(operand: Operand) -> tuple[int, ...]:
    """One value per slice, in a shape that broadcasts to the parameter."""
    layout = operand.layout
    return tuple(n if axis in layout.batch else 1 for axis, n in enumerate(layout.shape))


def _call(
    arguments: list[Any],
    results: list[tuple[tuple[int, ...], Any]],
    aliases: dict[int, int],
    forms: Sequence[Canonical],
    hp: Hyperparameters,
    diagnostics: bool,
) -> list[Any]:
    """The custom call as a module of StableHLO; ``results``: shapes and dtypes; ``aliases``: arguments to results."""
    from tensorflow.compiler.tf2xla.ops import gen_xla_ops

    takes = [_type(argument.shape, argument.dtype) for argument in arguments]
    gives = [_type(shape, dtype) for shape, dtype in results]
    words = [
        w for k, f in enumerate(forms) for w in (int(f.factored), f.outer, f.rows, f.inner, f.columns, f.slices, k)
    ]
    flags = {"clip": hp.clip_threshold is not None, "scale": hp.scale_parameter, "scale_after_decay": True}
    config = [f"{name} = {str(flag).lower()}" for name, flag in (flags | {"diagnostics": diagnostics}).items()]
    config.append(f"tensors = array<i64: {', '.join(map(str, words))}>")
    alias = (
        "#stablehlo.output_operand_alias<output_tuple_indices = [{}], operand_index = {}, operand_tuple_indices = []>"
    )
    shared = [alias.format(to, of) for of, to in aliases.items()]
    names = [f"%a{k}" for k in range(len(takes))]
    parameters = ", ".join(f"{name}: {kind}" for name, kind in zip(names, takes, strict=True))
    values = [f"%r#{k}" for k in range(len(gives))] if len(gives) > 1 else ["%r"]
    module = f"""
module @adafactor {{
  func.func public @main({parameters}) -> ({", ".join(gives)}) {{
    %r{f":{len(gives)}" if len(gives) > 1 else ""} = stablehlo.custom_call @{_CALL}({", ".join(names)}) {{
      api_version = 4 : i32, backend_config = {{{", ".join(config)}}},
      operand_layouts = [{", ".join(_row_major(argument.shape) for argument in arguments)}],
      result_layouts = [{", ".join(_row_major(shape) for shape, _ in results)}],
      output_operand_aliases = [{", ".join(shared)}]
    }} : ({", ".join(takes)}) -> ({", ".join(gives)})
    return {", ".join(values)} : {", ".join(gives)}
  }}
}}
"""
    out: list[Any] = gen_xla_ops.xla_call_module(
        arguments,
        version=_VERSION,
        module=module,
        Sout=[shape for shape, _ in results],
        Tout=[dtype for _, dtype in results],
        platforms=["CPU"],
    )
    return out


def _type(shape: Sequence[int], dtype: Any) -> str:
    return f"tensor<{''.join(f'{n}x' for n in shape)}{_MLIR[dtype.name]}>"


def _row_major(shape: Sequence[int]) -> str:
    axes = ", ".join(str(axis) for axis in reversed(range(len(shape))))
    return f"dense<{f'[{axes}]' if axes else ''}> : tensor<{len(shape)}xindex>"


@cache
def _register() -> str | None:
    library, kernels = ctypes.CDLL(str(op.library_path())), ctypes.CDLL(native.info().path)
    register = library.adafactor_tensorflow_register_xla
    register.argtypes, register.restype = (ctypes.c_char_p, ctypes.c_void_p), ctypes.c_char_p
    refusal = register(_CALL.encode(), ctypes.cast(getattr(kernels, _CALL), ctypes.c_void_p))
    if refusal is not None:
        return f"TensorFlow {tf.__version__} does not take the native kernels into XLA: {refusal.decode()}."
    try:
        from tensorflow.compiler.tf2xla.ops import gen_xla_ops

        _ = gen_xla_ops.xla_call_module
    except (ImportError, AttributeError) as error:  # private names, that may go
        return f"TensorFlow {tf.__version__} lets nobody call into XLA: {error}."
    kernels.adafactor_xla_configure(ctypes.c_int64(op.threads()), ctypes.c_int64(native.isa()))
    return None
