"""Ten steps of a small model of each library, and the loss falls."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from adafactor.optax import adafactor

RNG = np.random.default_rng(0)
X = jnp.asarray(RNG.standard_normal((32, 8)), jnp.float32)
Y = jnp.sin(X @ jnp.asarray(RNG.standard_normal((8, 4)), jnp.float32))
OPTIONS = {"learning_rate": 0.05, "min_dim_size_to_factor": 4, "momentum": 0.5}


def falls(losses):
    assert losses[-1] < 0.8 * losses[0]


def test_flax_nnx():
    nnx = pytest.importorskip("flax.nnx")

    class Model(nnx.Module):
        def __init__(self, rngs):
            self.first, self.second = nnx.Linear(8, 16, rngs=rngs), nnx.Linear(16, 4, rngs=rngs)

        def __call__(self, x):
            return self.second(nnx.relu(self.first(x)))

    model = Model(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, adafactor(**OPTIONS), wrt=nnx.Param)

    @nnx.jit
    def train(model, optimizer):
        loss, grads = nnx.value_and_grad(lambda m: jnp.mean((m(X) - Y) ** 2))(model)
        optimizer.update(model, grads)
        return loss

    falls([float(train(model, optimizer)) for _ in range(10)])


def test_flax_linen():
    linen = pytest.importorskip("flax.linen")
    train_state = pytest.importorskip("flax.training.train_state")
    model = linen.Sequential([linen.Dense(16), linen.relu, linen.Dense(4)])
    state = train_state.TrainState.create(
        apply_fn=model.apply, params=model.init(jax.random.key(0), X), tx=adafactor(**OPTIONS)
    )

    state = state.replace(step=jnp.int32(0))  # flax starts with a Python number, which is another type

    @jax.jit
    def train(state):
        loss, grads = jax.value_and_grad(lambda p: jnp.mean((state.apply_fn(p, X) - Y) ** 2))(state.params)
        return state.apply_gradients(grads=grads), loss

    losses = []
    for _ in range(10):
        state, loss = train(state)
        losses.append(float(loss))
    falls(losses)
    assert train._cache_size() == 1


def test_equinox():
    eqx = pytest.importorskip("equinox")
    model = eqx.nn.MLP(8, 4, 16, 1, key=jax.random.key(0))
    tx = adafactor(**OPTIONS)
    state = tx.init(eqx.filter(model, eqx.is_inexact_array))

    @eqx.filter_jit
    def train(model, state):
        loss, grads = eqx.filter_value_and_grad(lambda m: jnp.mean((jax.vmap(m)(X) - Y) ** 2))(model)
        updates, state = tx.update(grads, state, eqx.filter(model, eqx.is_inexact_array))
        return eqx.apply_updates(model, updates), state, loss

    losses = []
    for _ in range(10):
        model, state, loss = train(model, state)
        losses.append(float(loss))
    falls(losses)


def test_flax_serialization():
    serialization = pytest.importorskip("flax.serialization")
    params = {"w": jnp.ones((140, 150)), "b": jnp.ones(3)}
    tx = adafactor(1e-2, momentum=0.9)
    _, state = tx.update(params, tx.init(params), params)
    restored = serialization.from_bytes(tx.init(params), serialization.to_bytes(state))
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    for a, b in zip(jax.tree.leaves(restored), jax.tree.leaves(state), strict=True):
        np.testing.assert_array_equal(a, b)


def test_orbax(tmp_path):
    checkpoint = pytest.importorskip("orbax.checkpoint")
    params = {"w": jnp.ones((140, 150)), "b": jnp.ones(3)}
    tx = optax.chain(optax.clip_by_global_norm(1.0), adafactor(1e-2))
    _, state = tx.update(params, tx.init(params), params)
    with checkpoint.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
    with checkpoint.StandardCheckpointer() as checkpointer:
        restored = checkpointer.restore(tmp_path / "state", jax.eval_shape(tx.init, params))
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    for a, b in zip(jax.tree.leaves(restored), jax.tree.leaves(state), strict=True):
        np.testing.assert_array_equal(a, b)
