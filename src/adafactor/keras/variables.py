"""What a Keras variable or gradient is, whichever backend made it."""

from __future__ import annotations

import itertools
from collections.abc import Container
from typing import Any

import keras
import numpy as np
from keras import ops

from adafactor.core.errors import message
from adafactor.core.factoring import Shape


def statistics_dtype(variable: Any) -> str:
    """float64 for a float64 variable, float32 for any other; refuses one that is not floating-point."""
    dtype = str(keras.backend.standardize_dtype(variable.dtype))
    if not keras.backend.is_float_dtype(dtype):
        remedy = "Mark the variable as not trainable."
        raise ValueError(message(f"the dtype of {path_of(variable)}", "a floating-point dtype", dtype, remedy))
    return "float64" if dtype == "float64" else "float32"


def path_of(variable: Any) -> str:
    """``layer/kernel``; a ``tf.Variable`` has a name with the number of an output behind it instead of a path."""
    return str(getattr(variable, "path", None) or str(variable.name).rpartition(":")[0] or variable.name)


def distinct(name: str, taken: Container[str]) -> str:
    """The name, with a number behind it where it is taken."""
    numbered = (f"{name}_{count}" for count in itertools.count(2))
    return name if name not in taken else next(other for other in numbered if other not in taken)


def is_sparse(gradient: Any) -> bool:
    """TensorFlow's IndexedSlices and JAX's BCOO; Keras has no public test for them."""
    return keras.backend.backend() != "torch" and hasattr(gradient, "indices")


def dense(gradient: Any, variable: Any) -> Any:
    """The gradient as a tensor, the slices of one row summed; Keras leaves TensorFlow's IndexedSlices as they are."""
    if is_sparse(gradient) and keras.backend.backend() == "tensorflow":
        rows = ops.convert_to_tensor(gradient.indices)  # a tuple is legal
        return ops.segment_sum(gradient.values, rows, num_segments=variable.shape[0])
    return ops.convert_to_tensor(gradient, sparse=False)


def static_shape(gradient: Any) -> tuple[int | None, ...] | None:
    """The shape as far as it is known; ``None`` where not even the rank is."""
    dense_shape = getattr(gradient, "dense_shape", None)
    if isinstance(dense_shape, (tuple, list)):  # legal, but then IndexedSlices.shape fails
        return tuple(dense_shape)
    shape = gradient.shape if hasattr(gradient, "shape") else np.shape(gradient)
    return None if getattr(shape, "rank", 0) is None else tuple(shape)


def scalar(argument: str, value: Any) -> Any:
    """A number, or a tensor or variable of shape (), from what may be an array of one number."""
    shape = static_shape(value)
    if not shape:
        return value
    if any(n not in (None, 1) for n in shape):
        raise ValueError(message(argument, "one number", f"shape {shape}", "Return a scalar from the schedule."))
    return ops.reshape(ops.convert_to_tensor(value), ())


def reduced_layout(layout: Any, rank: int, removed: Shape) -> Any:
    """The distribution layout of a variable of ``rank`` axes less the axes that a statistic does not have."""
    if layout is None or not removed:
        return layout
    sharding = not isinstance(layout, keras.distribution.TensorLayout)
    axes = tuple(layout.spec if sharding else layout.axes)
    axes += (None,) * (rank - len(axes))
    axes = tuple(name for axis, name in enumerate(axes) if axis not in removed)
    if sharding:
        return type(layout)(layout.mesh, type(layout.spec)(*axes))
    return keras.distribution.TensorLayout(axes, layout.device_mesh)
