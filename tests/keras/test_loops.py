"""Loops of one's own around each framework's differentiation, and what they may hand to ``apply``."""

import keras
import numpy as np
import pytest
from keras import ops
from keras_support import make_variables, numbers, problem, small_model, tensors

from adafactor.keras import Adafactor

SHAPES = {"matrix": (3, 4), "vector": (5,)}


@pytest.mark.parametrize("kind", ["numpy", "generator", "low precision"])
def test_gradients_need_not_be_tensors_of_the_variables_dtype(kind):
    values, ((first, second),) = problem(SHAPES, steps=1)
    given = {
        "numpy": [first.astype("float32"), second.astype("float32")],
        "generator": (g for g in tensors([first, second])),
        "low precision": tensors([first, second], "bfloat16"),
    }[kind]
    expected, variables = make_variables(values), make_variables(values)
    Adafactor(0.1).apply(tensors([first, second]), expected)
    Adafactor(0.1).apply(given, variables)
    for one, other in zip(numbers(variables), numbers(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-2 if kind == "low precision" else 1e-6, atol=1e-3)


@pytest.mark.parametrize("shape", [(), (3,), (3, 4)])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_a_gradient_that_is_not_finite_shows(shape, dtype):
    (variable,) = make_variables([np.ones(shape)], dtype)
    g = np.ones(shape)
    g[(0,) * len(shape)] = np.nan
    Adafactor(0.1).apply(tensors([g], dtype), [variable])
    assert np.isnan(numbers([variable])[0]).any()


@pytest.mark.backend("torch", reason="a loop around torch's autograd")
def test_a_torch_loop():
    import torch

    model = small_model()
    optimizer = Adafactor(0.1)
    losses = []
    for _ in range(5):
        model.zero_grad()
        loss = model(torch.ones(2, 8)).square().mean()
        loss.backward()
        optimizer.apply([v.value.grad for v in model.trainable_variables], model.trainable_variables)
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(v.value.requires_grad and v.value.is_leaf for v in model.trainable_variables)
    assert not any(v.value.requires_grad for v in optimizer.variables)


@pytest.mark.backend("tensorflow", reason="a loop around tf.GradientTape")
@pytest.mark.parametrize("jit_compile", [True, False])
def test_a_tensorflow_loop(jit_compile):
    import tensorflow as tf

    model = small_model()
    optimizer = Adafactor(0.1)
    optimizer.build(model.trainable_variables)

    @tf.function(jit_compile=jit_compile)
    def step(x):
        with tf.GradientTape() as tape:
            loss = ops.mean(ops.square(model(x)))
        optimizer.apply(tape.gradient(loss, model.trainable_variables), model.trainable_variables)
        return loss

    losses = [float(step(tf.ones((2, 8)))) for _ in range(5)]
    assert losses[-1] < losses[0]


@pytest.mark.backend("jax", reason="a loop around jax.grad")
def test_a_jax_loop():
    import jax

    model = small_model()
    optimizer = Adafactor(0.1)
    optimizer.build(model.trainable_variables)

    def loss(weights, x):
        y, _ = model.stateless_call(weights, [], x)
        return ops.mean(ops.square(y))

    @jax.jit
    def step(weights, state, x):
        value, gradients = jax.value_and_grad(loss)(weights, x)
        return value, *optimizer.stateless_apply(state, gradients, weights)

    weights, state = [v.value for v in model.trainable_variables], [v.value for v in optimizer.variables]
    losses = []
    for _ in range(5):
        value, weights, state = step(weights, state, np.ones((2, 8), "float32"))
        losses.append(float(value))
    assert losses[-1] < losses[0]


def test_rows_of_an_embedding_that_were_not_looked_up_stay():
    layer = keras.layers.Embedding(7, 3)
    model = keras.Sequential([keras.Input((4,), dtype="int32"), layer, keras.layers.Flatten(), keras.layers.Dense(1)])
    model.compile(Adafactor(0.1), "mse")
    before = numbers([layer.embeddings])[0]
    model.fit(np.array([[0, 1, 1, 2]] * 4), np.ones((4, 1)), verbose=0)
    after = numbers([layer.embeddings])[0]
    np.testing.assert_array_equal(after[3:], before[3:])
    assert (after[:3] != before[:3]).any(axis=1).all()
