"""The native step as a TensorFlow op on CPU; ``native/tensorflow.cpp`` is the other side of this file.

The op is stateless: values in, values out. Where nobody else holds a gradient its memory becomes the parameter's, so a
step of a variable reads gradient and parameter and writes the new parameter, and copies nothing.

    ADAFACTOR_TENSORFLOW    ops: TensorFlow's own operations instead, everywhere. Default: native, where it can be.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from adafactor.core import native
from adafactor.core.canonical import canonical
from adafactor.core.errors import message
from adafactor.core.factoring import Layout
from adafactor.core.hyperparameters import Hyperparameters

Tensor = Any


class Operand(NamedTuple):
    """What one parameter brings to a step.

    Attributes:
        layout: the role of every axis; the parameter has elements and a form that the kernels know.
        x, g: parameter and gradient of ``layout.shape``, of any of ``native.DTYPES``.
        slots: statistics by the names of ``layout.slots``, float32, float64 for a float64 parameter.
        momentum: of the parameter's shape and the statistics' dtype, where ``beta_1`` asks for one.
        diagnostics: of shape [slices..., 3] and the statistics' dtype, where they are asked for: RMS(u) before clipping
            (eq. 7), what clipping divides by (eq. 10) and the parameter scale (eq. 9). Only its shape is read.
        weight_decay: x is multiplied by 1 - learning_rate * weight_decay before the step.
    """

    layout: Layout
    x: Tensor
    g: Tensor
    slots: dict[str, Tensor]
    momentum: Tensor | None
    diagnostics: Tensor | None
    weight_decay: float


class Result(NamedTuple):
    """The new values of an `Operand`."""

    x: Tensor
    slots: dict[str, Tensor]
    momentum: Tensor | None
    diagnostics: Tensor | None


def why_not() -> str | None:
    """One sentence that says why TensorFlow does not use the native kernels on CPU, or ``None`` where it does."""
    asked = os.environ.get("ADAFACTOR_TENSORFLOW", "").strip()
    if asked not in ("", "native", "ops"):
        raise ValueError(message("ADAFACTOR_TENSORFLOW", "native or ops", asked, "Unset it for native."))
    if asked == "ops":
        return "ADAFACTOR_TENSORFLOW=ops asks for TensorFlow's operations."
    reason = native.why_not()
    if reason is not None:
        return reason
    module = _load()
    return module if isinstance(module, str) else None


def why_not_here(device: str, layout: Layout, dtypes: Sequence[str]) -> str | None:
    """The same of one parameter: of its device, its form, and the dtypes of itself and its gradient."""
    reason = why_not()
    if reason is not None:
        return reason
    if not _is_ours(device):
        return f"The op runs on a CPU of this process, not on {device or 'a device yet unknown'}."
    if not set(dtypes) <= set(native.DTYPES):
        return f"The native kernels know {', '.join(native.DTYPES)}, not {', '.join(dtypes)}."
    if _form(layout) is None:
        return f"The native kernels have no form for a parameter of shape {layout.shape} factored like this."
    return None


def step(
    operands: Sequence[Operand], hp: Hyperparameters, learning_rate: Tensor, ema_weight: Tensor, rho: Tensor
) -> list[Result]:
    """One update of parameters that share their dtype, their gradients' dtype and their device.

    Args:
        operands: each such that `why_not_here` is ``None``.
        learning_rate, ema_weight, rho: float64 scalars: before eq. 8, 1 - beta(t) (eq. 1), after eq. 8. RMS(x) is taken
            after weight decay, as Keras does.
    """
    module = _load()
    assert not isinstance(module, str)
    forms = [form for operand in operands if (form := _form(operand.layout)) is not None]
    words = [(int(f.factored), f.outer, f.rows, f.inner, f.columns, f.slices) for f in forms]
    names = [[name for name in form.slots if name] for form in forms]
    statistics = [o.slots[name] for o, its in zip(operands, names, strict=True) for name in its]
    momenta = [] if hp.momentum is None else [o.momentum for o in operands]
    diagnostics = [o.diagnostics for o in operands if o.diagnostics is not None]
    clip = np.inf if hp.clip_threshold is None else hp.clip_threshold
    constants = tf.constant([hp.epsilon_1, hp.epsilon_2, clip, hp.momentum or 0.0], tf.float64)
    out = module.adafactor_step(
        params=[o.x for o in operands],
        statistics=statistics,
        momenta=momenta,
        diagnostics=diagnostics,
        grads=[o.g for o in operands],
        numbers=tf.concat([tf.stack([learning_rate, rho, ema_weight]), constants], 0),
        weight_decays=tf.constant([o.weight_decay for o in operands], tf.float64),
        tensors=[word for each in words for word in each],
        scale=hp.scale_parameter,
        keep=not tf.executing_eagerly(),  # a node steps its own parameters; an eager kernel serves many, and never ends
    )
    rest = iter(out.new_statistics)
    slots = [{name: next(rest) for name in its} for its in names]
    nothing = [None] * len(operands)
    return [
        Result(*values)
        for values in zip(
            out.new_params, slots, out.new_momenta or nothing, out.new_diagnostics or nothing, strict=True
        )
    ]


_form = cache(canonical)
_spec = cache(tf.DeviceSpec.from_string)


def gradients() -> tuple[int, int]:
    """How many gradients the op has seen in this process, and of how many the memory became their parameter's."""
    seen, taken = ctypes.c_int64(), ctypes.c_int64()
    ctypes.CDLL(str(library_path())).adafactor_tensorflow_gradients(ctypes.byref(seen), ctypes.byref(taken))
    return seen.value, taken.value


def held() -> int:
    """Of how many parameters the op keeps the sum of squares until their next step, and their memory as it is."""
    count = ctypes.CDLL(str(library_path())).adafactor_tensorflow_left
    count.restype = ctypes.c_int64
    return int(count())


def library_path() -> Path:
    main = native.path()
    assert main is not None
    return main.with_name(f"{main.stem}_tensorflow{main.suffix}")


@cache
def _load() -> Any:
    """The module with the op, or the reason why there is none. Registered once per process, and for good."""
    path = library_path()
    if not path.is_file():
        return f"TensorFlow's op is not built: there is no {path}. Reinstall this package."
    try:
        module = tf.load_op_library(str(path))
        library = ctypes.CDLL(str(path))
        missing, connect = library.adafactor_tensorflow_missing, library.adafactor_tensorflow_connect
    except (OSError, AttributeError, tf.errors.OpError) as error:
        return f"TensorFlow's op at {path} cannot be loaded: {str(error).splitlines()[0]}."
    missing.restype = ctypes.c_char_p
    what = missing()
    if what is not None:
        return f"TensorFlow {tf.__version__} cannot take the op at {path}: {what.decode()}."
    if not hasattr(module, "adafactor_step"):
        return f"TensorFlow's op at {path}, or a copy of it, was opened before, and not by TensorFlow or not for us."
    try:
        in_xla()
    except (ImportError, AttributeError, TypeError) as error:  # private names, that may go
        return f"TensorFlow {tf.__version__} does not tell which graphs XLA compiles: {error}."
    kernels = ctypes.CDLL(native.info().path)
    connect.argtypes = (ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64)
    abi = kernels.adafactor_abi
    abi.restype = ctypes.c_int64
    address = ctypes.cast(kernels.adafactor_step, ctypes.c_void_p)
    if not connect(address, abi(), threads(), native.isa()):
        return f"TensorFlow's op at {path} belongs to another version of this package. Reinstall it."
    with contextlib.suppress(KeyError):  # this module was reloaded, but not TensorFlow
        tf.no_gradient("Adafactor>Step")
    return module


def threads() -> int:
    """How many threads a call of the native kernels uses: as many as TensorFlow was told to use for one op."""
    return native.threads(tf.config.threading.get_intra_op_parallelism_threads() or None)


def in_xla() -> bool:
    """Whether what is traced now will be compiled by XLA, which does not know the op."""
    from tensorflow.python.framework import ops
    from tensorflow.python.ops import control_flow_util

    return bool(control_flow_util.GraphOrParentsInXlaContext(ops.get_default_graph()))


def _is_ours(device: str) -> bool:
    """Whether a device is a CPU of this process: for sure without a cluster, or where every worker runs the step."""
    spec, strategy = _spec(device), tf.distribute.get_strategy()
    if spec.device_type != "CPU":
        return False
    if spec.job in (None, "localhost"):
        return True
    if not isinstance(strategy, tf.distribute.MultiWorkerMirroredStrategy):
        return False
    resolver = strategy.cluster_resolver
    return bool((spec.job, spec.task) == (resolver.task_type, resolver.task_id))
