"""What XLA needs besides ``array.py``: JAX's names for the operations, and a barrier against shared temporaries.

The rows, the columns and the update each read g². XLA would compute it once and keep it (or g cast to float32), a
temporary as large as the parameter; behind a barrier each read squares g again, in registers.
"""

from __future__ import annotations

from types import SimpleNamespace

import jax
import jax.numpy as jnp

_NAMES = ("absolute", "maximum", "minimum", "power", "reshape", "sqrt", "square", "sum", "where")

ops = SimpleNamespace(
    **{name: getattr(jnp, name) for name in _NAMES}, rsqrt=jax.lax.rsqrt, cast=jax.lax.convert_element_type
)


def barrier(*arrays: jax.Array) -> tuple[jax.Array, ...]:
    """The arrays themselves; the compiler computes nothing on their far side from their near side."""
    behind: tuple[jax.Array, ...] = jax.lax.optimization_barrier(arrays)  # type: ignore[no-untyped-call]
    return behind
