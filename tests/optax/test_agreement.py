"""The same numbers as the oracle, and as optax.adafactor where deviations.toml has no row."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax_support import assert_close, run
from trajectories import Trajectory

from adafactor import Factored
from adafactor.engine.xla.primitives import enable_x64
from adafactor.optax import adafactor


def schedule(count):
    return 1e-2 / (1 + count)


OPTIONS = {
    "default": {},
    "rate": {"learning_rate": 1e-2},
    "momentum": {"learning_rate": schedule, "momentum": 0.9, "weight_decay_rate": 0.01},
    "plain": {
        "learning_rate": 1e-2,
        "clipping_threshold": None,
        "multiply_by_parameter_scale": False,
        "factored": False,
        "eps": 1e-10,
        "decay_rate": 0.6,
    },
    "mask": {
        "learning_rate": 1e-2,
        "min_dim_size_to_factor": 2,
        "clipping_threshold": 0.5,
        "weight_decay_rate": schedule,
        "weight_decay_mask": {"kernel": True, "bias": False, "stack": True, "scale": False},
        "decay_offset": -10,
    },
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_optax(options, path, params, grads):
    expected, _ = run(optax.adafactor(**options), params, grads)
    for form in ("jit", "step"):
        got, _ = run(adafactor(**options), params, grads, form)
        for step, reached in enumerate(got):
            assert_close(reached, expected[step])


def test_not_jitted(params, grads):
    options = OPTIONS["momentum"]
    assert_close(
        run(adafactor(**options), params, grads, "eager")[0], run(optax.adafactor(**options), params, grads)[0]
    )


SHAPES = [(), (7,), (3, 5), (200, 300), (5, 40, 30), (40, 5, 30), (2, 3, 4, 5), (1, 9), (300, 7)]
FACTORINGS = ["largest_two", "last_two", "smallest", "sets", "batch", "none"]


def spec(name, shape):
    rank = len(shape)
    if rank < 2 or name == "none":
        return None
    if name == "sets":
        return Factored(rows=(0,), columns=tuple(range(1, rank)))
    if name == "batch":
        return Factored(rows=(1,), columns=(2,), batch=(0,)) if rank > 2 else Factored(batch=(0,))
    return None


def follow(shapes, dtype, factoring, form="step", steps=3):
    """One transformation over parameters of these shapes, each beside its oracle."""
    rule = factoring if factoring in FACTORINGS[:3] else lambda path, shape: spec(factoring, shape)
    numbers = {"clip_threshold": 0.7, "relative_step": True, "beta_2_max": 0.6, "learning_rate": 0.5, "factoring": rule}
    trajectories = [Trajectory("jax", shape, dtype, numbers) for shape in shapes]
    tx = adafactor(0.5, 1, clipping_threshold=0.7, relative_step=True, decay_rate_max=0.6, factoring=rule)
    params = [jnp.asarray(one.start) for one in trajectories]
    state, step = tx.init(params), jax.jit(tx.step if form == "step" else tx.update)
    for _ in range(steps):
        grads = [jnp.asarray(one.next_gradient()) for one in trajectories]
        if form == "step":
            params, state = step(params, grads, state)
        else:
            updates, state = step(grads, state, params)
            params = optax.apply_updates(params, updates)
        for one, x in zip(trajectories, params, strict=True):
            one.check(x)
    for k, one in enumerate(trajectories):
        one.check_state(int(state.count), {name: getattr(state, name)[k] for name in one.oracle.state.second_moment})


@pytest.mark.parametrize("factoring", FACTORINGS)
def test_reference(factoring, path):
    for form in ("jit", "step") if factoring == "sets" else ("step",):
        follow(SHAPES, "float32", factoring, form)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_halves_are_rounded_once(dtype, path):
    follow([(140, 150), (7,), (2, 3, 4, 5)], dtype, "last_two")


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_updates_have_the_parameters_dtype(dtype, path, rng):
    x, g = (jnp.asarray(rng.standard_normal((140, 150)), dtype) for _ in range(2))
    tx = adafactor(0.1)
    updates, state = jax.jit(tx.update)(g, tx.init(x), x)
    assert (updates.dtype, state.row.dtype) == (dtype, jnp.float32)


def test_float64():
    with enable_x64():
        follow([(20, 30), (7,), (2, 3, 4)], "float64", "last_two")


def test_native_and_jnp_agree_under_vmap(path, rng):
    """Three models at once: each as if it were alone, with a count and a clip of its own."""
    x = jnp.asarray(rng.standard_normal((3, 140, 150)), jnp.float32)
    g = jnp.asarray(rng.standard_normal((3, 140, 150)) * [[[1]], [[100]], [[1e-3]]], jnp.float32)
    tx = adafactor(1e-2)
    state = jax.vmap(tx.init)(x)
    state = state._replace(count=jnp.array([0, 5, 100]))
    lowered = jax.jit(jax.vmap(tx.step)).lower(x, g, state).as_text()
    assert ("adafactor_xla_step" in lowered) == (path == "native")
    together, _ = jax.jit(jax.vmap(tx.step))(x, g, state)
    updates, _ = jax.jit(jax.vmap(tx.update))(g, state, x)
    for k in range(3):
        one, _ = tx.step(x[k], g[k], jax.tree.map(lambda a, k=k: a[k], state))
        assert_close(together[k], one)
        assert_close(updates[k], one - x[k], 1e-3)


def test_vmap_over_learning_rates(params, grads):
    def first(rate):
        tx = adafactor(rate)
        return tx.update(grads[0], tx.init(params), params)[0]

    both = jax.jit(jax.vmap(first))(jnp.array([1e-2, 3.0]))
    for k, rate in enumerate((1e-2, 3.0)):
        assert_close(jax.tree.map(lambda a, k=k: a[k], both), first(rate))


def test_scan(path, params, grads):
    tx = adafactor(1e-2, momentum=0.5)

    def body(carry, g):
        updates, state = tx.update(g, carry[1], carry[0])
        return (optax.apply_updates(carry[0], updates), state), None

    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *grads)
    (scanned, state), _ = jax.jit(lambda c, g: jax.lax.scan(body, c, g))((params, tx.init(params)), stacked)
    assert_close(scanned, run(tx, params, grads)[0][-1])
    assert int(state.count) == len(grads)


def test_gradient_through_the_optimizer():
    """Meta-learning: the derivative of a loss by the learning rate, through two steps."""
    start = {"w": jnp.linspace(-1.0, 1.0, 130 * 140).reshape(130, 140)}

    def loss(rate, make):
        tx, p = make(rate), start
        state = tx.init(p)
        for _ in range(2):
            updates, state = tx.update(jax.tree.map(lambda a: a**3, p), state, p)
            p = optax.apply_updates(p, updates)
        return jnp.sum(p["w"] ** 2)

    ours = jax.jit(jax.grad(lambda rate: loss(rate, adafactor)))(1e-2)
    theirs = jax.jit(jax.grad(lambda rate: loss(rate, optax.adafactor)))(1e-2)
    np.testing.assert_allclose(ours, theirs, rtol=1e-4)


@pytest.mark.parametrize("form", ["jit", "step"])
def test_a_column_without_gradient_beside_a_huge_one(path, form):
    """Its factor is about 1e31 there; with a step size of 1e14 beside it, it was inf, and 0 * inf is NaN."""
    x, g = jnp.full((2, 6), 1e16), jnp.zeros((2, 6)).at[:, 2].set(1e16)
    moved, _ = run(adafactor(0.01, 1), x, [g], form)
    assert_close(moved[0], 1e16 * (1 - 0.01 * np.sign(g)))


@pytest.mark.parametrize("form", ["jit", "step"])
def test_clipping_sees_gradients_whose_squares_underflow(path, form):
    """Alone in its row and its column, 1e-23 is a normalised update of 2.5e6 beside a gradient of 1."""
    x, g = jnp.ones((4, 4)), jnp.zeros((4, 4)).at[0, 0].set(1.0).at[3, 3].set(1e-23)
    moved, _ = run(adafactor(0.25, 1), x, [g], form)
    assert_close(moved[0], 1 - np.diag([0.0, 0.0, 0.0, 1.0]))
