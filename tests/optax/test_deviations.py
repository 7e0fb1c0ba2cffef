"""Every known difference from optax.adafactor, shown on both sides. A test per row of deviations.toml."""

import tomllib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from adafactor.optax import adafactor

ROWS = tomllib.loads((Path(__file__).parent / "deviations.toml").read_text())


def bfloat16_statistics():
    """3,000 steps of g² = 4 from step 5,000 and v = 1."""

    def statistic(tx, dtype, start):
        x = {"w": jnp.zeros((128, 128), dtype)}
        g = {"w": jnp.full((128, 128), 2, dtype)}
        body = lambda _, state: tx.update(g, state, x)[1]  # noqa: E731
        return jax.jit(lambda s: jax.lax.fori_loop(0, 3000, body, s))(start(tx.init(x)))

    def ours(dtype):
        ones = lambda s: jax.tree.map(jnp.ones_like, s)._replace(count=jnp.int32(5000))  # noqa: E731
        return float(statistic(adafactor(1e-3), dtype, ones).row["w"][0])

    def theirs(state):
        ones = jax.tree.map(jnp.ones_like, state[0])._replace(count=jnp.int32(5000))
        return (ones, *state[1:])

    exact = ours(jnp.float32)
    assert exact > 3.7
    assert abs(ours(jnp.bfloat16) / exact - 1) < 0.01
    assert float(statistic(optax.adafactor(1e-3), jnp.bfloat16, theirs)[0].v_row["w"][0]) == 1.0


def _once(tx, x, g, steps=1):
    state = tx.init(x)
    for _ in range(steps):
        updates, state = tx.update(g, state, x)
    return updates


def float16_zero_gradient():
    x, g = jnp.ones((4, 4), jnp.float16), jnp.zeros((4, 4), jnp.float16)
    assert np.isnan(_once(optax.adafactor(1e-3), x, g)).all()
    assert not np.any(_once(adafactor(1e-3), x, g))


def low_precision_momentum():
    x = jnp.ones((4, 4), jnp.bfloat16)
    assert _once(optax.adafactor(1e-3, momentum=0.9), x, x).dtype == jnp.float32
    assert _once(adafactor(1e-3, momentum=0.9), x, x).dtype == jnp.bfloat16
    state = adafactor(1e-3, momentum=0.9, dtype_momentum="bfloat16").init(x.astype(jnp.float32))
    assert state.momentum.dtype == jnp.bfloat16


def decay_offset_in_the_future():
    x = jnp.ones((4, 4))
    assert np.isnan(_once(optax.adafactor(1e-3, decay_offset=5), x, x, steps=7)).all()
    late, fresh = adafactor(1e-3, decay_offset=5), adafactor(1e-3)
    np.testing.assert_array_equal(_once(late, x, x, steps=3), _once(fresh, x, x))


def inject_hyperparams_under_jit():
    x = jnp.ones((140, 150))
    tx = optax.inject_hyperparams(optax.adafactor)(1e-2)
    state = tx.init(x)
    with pytest.raises(jax.errors.TracerBoolConversionError):
        jax.jit(tx.update)(x, state, x)
    tx = optax.inject_hyperparams(adafactor)(1e-2, momentum=0.9, clipping_threshold=0.5)
    updates, state = jax.jit(tx.update)(x, jax.jit(tx.init)(x), x)
    np.testing.assert_allclose(updates, _once(adafactor(1e-2, momentum=0.9, clipping_threshold=0.5), x, x), rtol=1e-6)
    state.hyperparams["learning_rate"] = jnp.float32(0)
    np.testing.assert_allclose(jax.jit(tx.update)(x, state, x)[0], 0.9 * updates, rtol=1e-6)  # momentum is left

    tx = optax.inject_hyperparams(adafactor)(1e-2, min_dim_size_to_factor=256)
    assert tx.init(x).inner_state.row is None
    jax.jit(tx.update)(x, tx.init(x), x)  # the state knows what was decided
    with pytest.raises(TypeError, match='static_args="min_dim_size_to_factor"'):
        jax.jit(tx.init)(x)


def placeholders():
    x = {"w": jnp.ones((140, 150)), "b": jnp.ones(3)}
    assert (1,) in {leaf.shape for leaf in jax.tree.leaves(optax.adafactor(1e-3).init(x))}
    shapes = sorted(leaf.shape for leaf in jax.tree.leaves(adafactor(1e-3).init(x)))
    assert shapes == [(), (3,), (140,), (150,)]


def zero_gradient_row():
    x = jnp.ones((128, 128))
    g = x.at[3].set(0).at[:, 5].set(0) * 1e10
    assert not np.isfinite(_once(optax.adafactor(1e-3), x, g)).all()
    updates = _once(adafactor(1e-3), x, g)
    assert np.isfinite(updates).all()
    assert not np.any(updates[3])


def empty_parameter():
    x = jnp.ones((0, 3))
    assert _once(adafactor(1e-3), x, x).shape == x.shape


def complex_parameters():
    x = jnp.ones((4, 4), jnp.complex64)
    _once(optax.adafactor(1e-3), x, x)
    with pytest.raises(TypeError, match="real floating dtype"):
        adafactor(1e-3).init(x)


@pytest.mark.parametrize("row", ROWS)
def test_deviation(row):
    assert set(ROWS[row]) == {"optax", "ours", "reason"}
    globals()[row]()
