"""What the tests of this directory share."""

import jax
import numpy as np
import optax
from tolerances import TOLERANCES


def run(tx, params, grads, form="jit"):
    """The parameters after each of the gradients, and the last state."""
    state = tx.init(params)
    update = tx.update if form == "eager" else jax.jit(tx.update)
    if form == "step":
        step = jax.jit(tx.step)
    trajectory = []
    for g in grads:
        if form == "step":
            params, state = step(params, g, state)
        else:
            updates, state = update(g, state, params)
            params = optax.apply_updates(params, updates)
        trajectory.append(params)
    return trajectory, state


def assert_close(got, expected, tolerance=TOLERANCES["optax"]["float32"]):
    """Within ``tolerance`` of the largest number of every leaf."""
    a, b = jax.tree.leaves(got), jax.tree.leaves(expected)
    assert len(a) == len(b)
    for x, y in zip(a, b, strict=True):
        x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
        assert x.shape == y.shape
        if x.size:
            np.testing.assert_allclose(x, y, rtol=0, atol=tolerance * max(np.abs(y).max(), 1e-30))
