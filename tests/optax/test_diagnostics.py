"""RMS(u), the clip factor and the parameter scale of every update, in the state."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from adafactor.optax import adafactor

SHAPES = {"matrix": (130, 140), "vector": (150,), "stack": (3, 130, 128), "scalar": ()}


@pytest.mark.parametrize("clip", [0.5, None], ids=str)
@pytest.mark.parametrize("scale", [True, False])
def test_values(path, rng, clip, scale):
    """The oracle's numbers, and neither another step nor another state."""
    params = {name: jnp.asarray(rng.standard_normal(shape), jnp.float32) for name, shape in SHAPES.items()}
    options = {
        "clipping_threshold": clip,
        "multiply_by_parameter_scale": scale,
        "batch_axes": {**dict.fromkeys(SHAPES, ()), "stack": (0,)},
    }
    with_, without = adafactor(1e-2, **options, diagnostics=True), adafactor(1e-2, **options)
    state, plain = with_.init(params), without.init(params)
    assert plain.diagnostics is None
    for _ in range(3):
        grads = {name: jnp.asarray(rng.standard_normal(shape) ** 3, jnp.float32) for name, shape in SHAPES.items()}
        before = params
        updates, state = jax.jit(with_.update)(grads, state, params)
        expected, plain = jax.jit(without.update)(grads, plain, params)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-6), updates, expected)
        params = jax.tree.map(jnp.add, params, updates)
    for name in SHAPES:
        rms, factor, its_scale = (np.asarray(tree[name]) for tree in state.diagnostics)
        assert rms.shape == factor.shape == its_scale.shape == ((3,) if name == "stack" else ())
        x = np.asarray(before[name], np.float64)
        axes = (1, 2) if name == "stack" else None
        wanted = np.maximum(1e-3, np.sqrt(np.mean(x**2, axis=axes))) if scale else np.ones_like(rms)
        np.testing.assert_allclose(its_scale, wanted, rtol=1e-5)
        np.testing.assert_allclose(factor, np.maximum(1, rms / clip) if clip else 1, rtol=1e-6)
        # What the update's own root mean square says of the one before clipping.
        moved = np.sqrt(np.mean(np.asarray(updates[name], np.float64) ** 2, axis=axes)) / (1e-2 * wanted)
        np.testing.assert_allclose(rms / factor, moved, rtol=1e-4)
    assert clip is None or any(np.any(np.asarray(leaf) > 1) for leaf in jax.tree.leaves(state.diagnostics.clip_factor))


def test_vmap_and_step(path, rng):
    x = jnp.asarray(rng.standard_normal((3, 140, 150)), jnp.float32)
    g = jnp.asarray(rng.standard_normal((3, 140, 150)), jnp.float32)
    tx = adafactor(1e-2, diagnostics=True)
    state = jax.vmap(tx.init)(x)
    _, updated = jax.jit(jax.vmap(tx.update))(g, state, x)
    _, stepped = jax.jit(jax.vmap(tx.step))(x, g, state)
    for a, b in zip(updated.diagnostics, stepped.diagnostics, strict=True):
        assert a.shape == (3,)
        np.testing.assert_array_equal(a, b)
    _, one = tx.update(g[1], tx.init(x[1]), x[1])
    np.testing.assert_allclose(updated.diagnostics.update_rms[1], one.diagnostics.update_rms, rtol=1e-6)


@pytest.mark.skipif(jax.device_count() < 8, reason="needs 8 devices")
@pytest.mark.parametrize("kind", [jax.sharding.AxisType.Auto, jax.sharding.AxisType.Explicit], ids=["auto", "explicit"])
def test_sharded(kind, rng):
    """The same numbers from eight devices, and no second compilation."""
    mesh = jax.make_mesh((8,), ("model",), axis_types=(kind,))
    specs = {"matrix": P("model"), "stack": P("model"), "vector": P()}
    shardings = {name: NamedSharding(mesh, spec) for name, spec in specs.items()}
    params = {"matrix": (128, 136), "stack": (8, 128, 130), "vector": (150,)}
    params = {name: jnp.asarray(rng.standard_normal(shape), jnp.float32) for name, shape in params.items()}
    grads = jax.tree.map(lambda x: jnp.asarray(rng.standard_normal(x.shape), jnp.float32), params)
    options = {"batch_axes": {"matrix": (), "stack": (0,), "vector": ()}, "diagnostics": True}
    alone = adafactor(1e-2, **options)
    _, expected = alone.update(grads, alone.init(params), params)
    tx = adafactor(1e-2, **options, shardings=shardings)
    params, grads = jax.device_put(params, shardings), jax.device_put(grads, shardings)
    state = tx.init(params)
    update = jax.jit(tx.update)
    for k in range(3):
        _, state = update(grads, state, params)
        if k == 0:
            jax.tree.map(
                lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-6), state.diagnostics, expected.diagnostics
            )
    assert update._cache_size() == 1


@pytest.mark.parametrize("scale", [True, False])
@pytest.mark.parametrize("rate", [0.02, lambda count: 0.02 / (count + 1)], ids=["number", "schedule"])
def test_the_effective_learning_rate_is_that_of_the_next_update(scale, rate):
    options = {"multiply_by_parameter_scale": scale, "relative_step": True, "batch_axes": {"w": (0,), "b": ()}}
    tx = adafactor(rate, min_dim_size_to_factor=1, diagnostics=True, **options)
    params = {"w": jax.random.normal(jax.random.key(0), (3, 4, 5)), "b": jnp.full(6, 1e-5)}
    state = tx.init(params)
    for t in range(1, 4):
        expected = jax.jit(tx.effective_lr)(params, state)
        updates, state = tx.update(jax.tree.map(jnp.ones_like, params), state, params)
        rho = 0.02 / t if callable(rate) else min(0.02, t**-0.5)
        wanted = jax.tree.map(lambda s, rho=rho: rho * s, state.diagnostics.parameter_scale)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(*np.broadcast_arrays(a, b), rtol=1e-6), expected, wanted)
        params = jax.tree.map(jnp.add, params, updates)
