"""A whole training step in one jit: XLA copies no parameter for us, and what must wait for something waits."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from native_support import need

from adafactor.engine.xla import custom_call
from adafactor.optax import adafactor

SIDE = 272  # a weight is large enough for a call of its own


@pytest.fixture(autouse=True)
def native():
    need(custom_call.why_not())


def names(order):
    """Of four layers, whose weights a dict sorts as the layers run, in reverse, or neither."""
    return {"forward": "abcd", "reverse": "dcba", "mixed": "cadb"}[order]


def weights(order="forward", dtype=jnp.float32):
    rng = np.random.default_rng(0)
    return {name: jnp.asarray(rng.standard_normal((SIDE, SIDE)) / SIDE**0.5, dtype) for name in names(order)}


def loss(params, x, order="forward", penalty=0.0):
    y = x.astype(next(iter(params.values())).dtype)
    for name in names(order):
        y = jnp.tanh(y @ params[name])
    value = jnp.mean(jnp.square(y.astype(jnp.float32)))
    return value + penalty * sum(jnp.sum(jnp.square(p)) for p in params.values()) if penalty else value


def train(tx, form, order="forward", penalty=0.0):
    def step(params, state, x):
        value, grads = jax.value_and_grad(partial(loss, order=order, penalty=penalty))(params, x)
        if form == "step":
            return *tx.step(params, grads, state), value
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    return step


def copies(step, *arguments):
    """How many arrays as large as a weight the optimized program copies.

    The transpose of one in another order of memory is a gradient's, of which XLA alone decides.
    """
    program = jax.jit(step, donate_argnums=(0, 1)).lower(*arguments).compile().as_text()
    shape = rf"\[(?:\d+,)*{SIDE},{SIDE}\]"
    return len(re.findall(rf"= (?:f32|bf16){shape}\S* copy\((?!%transpose)", program))


X = jnp.ones((8, SIDE))


def test_the_count_can_fail():
    """SGD moves a weight that the gradient of the layer before still reads, as far as XLA knows."""
    tx = optax.sgd(1e-2)
    params = weights()
    assert copies(train(tx, "update"), params, tx.init(params), X) >= 3


@pytest.mark.parametrize("form", ["update", "step"])
@pytest.mark.parametrize("order", ["forward", "reverse", "mixed"])
@pytest.mark.parametrize("options", [{}, {"factored": False}], ids=["factored", "unfactored"])
def test_plain(form, order, options):
    tx, params = adafactor(1e-2, **options), weights(order)
    assert copies(train(tx, form, order), params, tx.init(params), X) == 0


@pytest.mark.parametrize("form", ["update", "step"])
def test_a_penalty_that_is_reported(form):
    """The sum of squares of the old weights is part of the loss, and no gradient depends on it."""
    tx, params = adafactor(1e-2), weights()
    assert copies(train(tx, form, penalty=1e-4), params, tx.init(params), X) == 0


@pytest.mark.parametrize("form", ["update", "step"])
def test_bfloat16(form):
    tx, params = adafactor(1e-2), weights(dtype=jnp.bfloat16)
    assert copies(train(tx, form), params, tx.init(params), X) == 0


@pytest.mark.parametrize("form", ["update", "step"])
def test_scan_over_steps(form):
    tx, params = adafactor(1e-2), weights()

    def epoch(params, state, xs):
        def body(carry, x):
            *carry, value = train(tx, form)(*carry, x)
            return tuple(carry), value

        return jax.lax.scan(body, (params, state), xs)

    assert copies(epoch, params, tx.init(params), jnp.stack([X] * 3)) == 0


def test_clip_by_global_norm_and_a_condition():
    clipped = optax.chain(optax.clip_by_global_norm(1.0), adafactor(1e-2))
    params = weights()
    assert copies(train(clipped, "update"), params, clipped.init(params), X) == 0
    careful = optax.apply_if_finite(adafactor(1e-2), 3)  # a branch that makes no step copies what it hands on
    plain = optax.apply_if_finite(optax.sgd(1e-2), 3)
    assert copies(train(careful, "update"), params, careful.init(params), X) <= copies(
        train(plain, "update"), params, plain.init(params), X
    )


@pytest.mark.parametrize("form", ["update", "step"])
@pytest.mark.parametrize("order", ["forward", "mixed"])
def test_the_order_changes_no_number(form, order):
    """The same training with calls that wait for nothing: gradients computed outside."""
    tx, params = adafactor(1e-2), weights(order)
    inside, outside = params, params
    states = [tx.init(params), tx.init(params)]
    whole, gradients = jax.jit(train(tx, form, order)), jax.jit(jax.grad(partial(loss, order=order)))
    alone = jax.jit(tx.step if form == "step" else lambda p, g, s: _update(tx, p, g, s))
    for _ in range(3):
        inside, states[0], _ = whole(inside, states[0], X)
        outside, states[1] = alone(outside, gradients(outside, X), states[1])
    for name in params:
        np.testing.assert_allclose(inside[name], outside[name], rtol=1e-6, atol=1e-7)


def _update(tx, params, grads, state):
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state
