"""Everything a Keras optimizer does around its step: loops, learning rates, decay, averages, scaling, accumulation."""

import keras
import numpy as np
import pytest
from keras_support import BACKEND, data, fit, fitted, make_variables, numbers, small_model, tensors, train

from adafactor.keras import Adafactor

ONES, GRADIENT = np.ones((2, 3)), np.arange(1.0, 7.0).reshape(2, 3)
JIT = [False] if BACKEND == "torch" else [False, True]


def moved(optimizer, steps=1, gradient=GRADIENT, start=ONES):
    (variable,) = variables = make_variables([start])
    for _ in range(steps):
        optimizer.apply(tensors([gradient]), variables)
    return numbers([variable])[0]


# -- loops ----


@pytest.mark.parametrize("jit_compile", JIT)
@pytest.mark.parametrize("embedding", [False, True], ids=["dense", "embedding"])
def test_fit_lowers_the_loss(jit_compile, embedding):
    model = small_model(embedding=embedding)
    model.compile(Adafactor(0.1), "mse", jit_compile=jit_compile)
    losses = fit(model, epochs=8).history["loss"]
    assert losses[-1] < 0.7 * losses[0]
    assert int(model.optimizer.iterations) == 32


def test_fit_is_the_same_however_it_is_compiled():
    weights = [fitted(jit_compile=jit).get_weights() for jit in JIT]
    weights.append(eager().get_weights())
    for other in weights[1:]:
        for a, b in zip(weights[0], other, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def eager():
    model = small_model()
    model.compile(Adafactor(0.1), "mse", run_eagerly=True)
    fit(model)
    return model


def test_apply_builds_and_apply_gradients_counts():
    first, second = Adafactor(0.1), Adafactor(0.1)
    a, b = make_variables([ONES]), make_variables([ONES])
    first.apply(tensors([GRADIENT]), a)
    assert int(second.apply_gradients(zip(tensors([GRADIENT]), b, strict=True))) == 1
    np.testing.assert_array_equal(*numbers([*a, *b]))


def test_apply_takes_some_of_the_variables():
    optimizer, variables = Adafactor(0.1), make_variables([ONES, ONES])
    optimizer.build(variables)
    optimizer.apply(tensors([GRADIENT]), variables[1:])
    first, second = numbers(variables)
    assert (first == 1).all()
    assert (second < 1).all()


@pytest.mark.backend("jax", "torch", reason="TensorFlow has no stateless_apply")
def test_stateless_apply_is_apply_and_leaves_its_arguments_alone():
    values = [ONES, np.ones(3), np.ones(())]
    gradients = tensors([GRADIENT, np.arange(3.0), np.ones(())])
    expected = make_variables(values)
    stateful = Adafactor(0.1, beta_1=0.5)
    stateful.apply(gradients, expected)
    variables = make_variables(values)
    optimizer = Adafactor(0.1, beta_1=0.5)
    optimizer.build(variables)
    old = [v.value for v in variables], [v.value for v in optimizer.variables]
    before = [np.array(keras.ops.convert_to_numpy(v)) for v in (*old[0], *old[1])]
    new = optimizer.stateless_apply(old[1], gradients, old[0])
    for value, was in zip((*old[0], *old[1]), before, strict=True):
        np.testing.assert_array_equal(keras.ops.convert_to_numpy(value), was)
    for value, variable in zip((*new[0], *new[1]), (*expected, *stateful.variables), strict=True):
        np.testing.assert_allclose(keras.ops.convert_to_numpy(value), numbers([variable])[0], rtol=1e-5)


@pytest.mark.backend("torch", reason="the others have no such mode")
def test_apply_works_outside_no_grad():
    import torch

    (variable,) = variables = make_variables([ONES])
    optimizer = Adafactor(0.1)
    for _ in range(2):
        variable.value.grad = None
        (variable.value**2).sum().backward()
        assert torch.is_grad_enabled()
        optimizer.apply([variable.value.grad], variables)
    assert variable.value.requires_grad
    assert variable.value.is_leaf
    assert not any(v.value.requires_grad for v in optimizer.variables)


# -- learning rate ----


def test_a_constant_learning_rate_is_a_variable_that_can_be_set():
    optimizer = Adafactor(0.5, relative_step=False)
    assert optimizer.variables[1].name == "learning_rate"
    half = moved(optimizer)
    again = Adafactor(1, relative_step=False)
    again.learning_rate = 0.5
    assert float(again.learning_rate) == 0.5
    np.testing.assert_array_equal(moved(again), half)


@pytest.mark.parametrize("rate", [keras.optimizers.schedules.ExponentialDecay(0.5, 1, 0.5), lambda: 0.5])
def test_a_schedule_or_callable_can_replace_a_constant(rate):
    optimizer = Adafactor(0.1)
    optimizer.learning_rate = rate
    assert [v.name for v in optimizer.variables] == ["iteration"]
    assert float(optimizer.learning_rate) == 0.5
    np.testing.assert_allclose(moved(optimizer), moved(Adafactor(0.5)), rtol=1e-6)


def test_the_learning_rate_of_a_schedule_cannot_be_set():
    optimizer = Adafactor(keras.optimizers.schedules.CosineDecay(0.1, 10))
    with pytest.raises(TypeError, match="not settable"):
        optimizer.learning_rate = 0.5


@pytest.mark.parametrize("rate", [keras.optimizers.schedules.CosineDecay(0.1, 8), lambda: 0.1])
def test_fit_follows_a_schedule_or_callable(rate):
    losses = [float(x) for x in compiled(Adafactor(rate), epochs=2).history.history["loss"]]
    assert losses[1] < losses[0]


def test_callbacks_change_the_learning_rate():
    model = fitted(Adafactor(0.1), callbacks=[keras.callbacks.LearningRateScheduler(lambda epoch, rate: 0.25)])
    assert float(model.optimizer.learning_rate) == 0.25


def compiled(optimizer, epochs=1, **options):
    model = small_model()
    model.compile(optimizer, "mse")
    fit(model, epochs, **options)
    return model


# -- weight decay ----


@pytest.mark.parametrize("by", ["var_list", "var_names", "all"])
def test_exclude_from_weight_decay(by):
    variables = make_variables([ONES, ONES], names=["kernel", "bias"])
    optimizer = Adafactor(0.5, weight_decay=0.5)
    excluded = {"var_list": variables[1:], "all": variables}
    optimizer.exclude_from_weight_decay(excluded.get(by), ["bias"] if by == "var_names" else None)
    optimizer.apply(tensors([np.zeros((2, 3))] * 2), variables)
    kernel, bias = numbers(variables)
    assert (kernel == (1.0 if by == "all" else 0.75)).all()
    assert (bias == 1.0).all()


def test_weight_decay_in_fit_shrinks_weights():
    plain, decayed = (np.abs(fitted(Adafactor(0.01, weight_decay=w), 4).get_weights()[0]).sum() for w in (None, 2.0))
    assert decayed < 0.9 * plain


# -- moving averages ----


def test_moving_averages_overwrite_the_weights_at_their_frequency():
    averaged, plain = Adafactor(0.5, use_ema=True, ema_momentum=0.5, ema_overwrite_frequency=2), Adafactor(0.5)
    (a,), (b,) = make_variables([ONES]), make_variables([ONES])
    averaged.apply(tensors([GRADIENT]), [a])
    plain.apply(tensors([GRADIENT]), [b])
    first = numbers([a])[0]
    np.testing.assert_allclose(first, numbers([b])[0], rtol=1e-6)
    averaged.apply(tensors([GRADIENT]), [a])
    plain.apply(tensors([GRADIENT]), [b])
    np.testing.assert_allclose(numbers([a])[0], (first + numbers([b])[0]) / 2, rtol=1e-6)


def test_finalize_variable_values_leaves_the_average():
    optimizer = Adafactor(0.5, use_ema=True, ema_momentum=0.5)
    variables = make_variables([ONES])
    for _ in range(3):
        optimizer.apply(tensors([GRADIENT]), variables)
    (average,) = (v for v in optimizer.variables if "average" in v.name)
    assert np.any(numbers(variables)[0] != numbers([average])[0])
    optimizer.finalize_variable_values(variables)
    np.testing.assert_array_equal(*numbers([*variables, average]))


def test_swap_ema_weights_evaluates_the_average():
    optimizer = Adafactor(0.5, use_ema=True, ema_momentum=0.9)
    model = small_model()
    model.compile(optimizer, "mse")
    x, y = data()
    seen = []
    probe = keras.callbacks.LambdaCallback(on_test_begin=lambda logs: seen.append(model.get_weights()[0]))
    callbacks = [keras.callbacks.SwapEMAWeights(), probe]
    model.fit(x, y, batch_size=4, verbose=0, callbacks=callbacks, validation_data=(x, y))
    # At the end of fit the weights are their averages: those that validation saw.
    np.testing.assert_allclose(model.get_weights()[0], seen[0], rtol=1e-5, atol=1e-6)


# -- loss scaling and mixed precision ----


def test_loss_scale_factor_scales_and_unscales():
    optimizer = Adafactor(0.5, loss_scale_factor=1024.0)
    assert float(optimizer.scale_loss(2.0)) == 2048.0
    np.testing.assert_allclose(moved(optimizer, gradient=1024 * GRADIENT), moved(Adafactor(0.5)), rtol=1e-6)


def test_the_loss_scale_optimizer_skips_what_is_not_finite():
    model = small_model()
    model.compile(keras.optimizers.LossScaleOptimizer(Adafactor(0.1), initial_scale=2.0**10), "mse")
    x, y = data(4)
    model.train_on_batch(x, y)
    weights = model.get_weights()
    model.train_on_batch(x, np.full_like(y, np.inf))
    for now, then in zip(model.get_weights(), weights, strict=True):
        np.testing.assert_array_equal(now, then)
    assert int(model.optimizer.inner_optimizer.iterations) == 1
    model.train_on_batch(x, y)
    assert all(np.isfinite(w).all() for w in model.get_weights())
    assert np.any(model.get_weights()[0] != weights[0])


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_fit_in_mixed_precision(policy):
    keras.config.set_dtype_policy(policy)
    model = small_model()
    model.compile(Adafactor(0.1), "mse")
    losses = fit(model, epochs=8).history["loss"]
    assert losses[-1] < 0.7 * losses[0]
    assert isinstance(model.optimizer, keras.optimizers.LossScaleOptimizer) == (policy == "mixed_float16")
    inner = getattr(model.optimizer, "inner_optimizer", model.optimizer)
    assert isinstance(inner, Adafactor)
    assert {str(v.dtype) for v in inner.variables[1:]} == {"float32"}


# -- several steps, several optimizers ----


@pytest.mark.parametrize("options", [{}, {"beta_1": 0.5, "weight_decay": 0.1, "clipnorm": 1.0}], ids=["plain", "all"])
def test_accumulated_gradients_are_one_batch_of_their_mean(options):
    rng = np.random.default_rng(0)
    micro = [[rng.normal(size=(2, 3)), rng.normal(size=3)] for _ in range(6)]
    mean = [[(a + b) / 2 for a, b in zip(*micro[i : i + 2], strict=True)] for i in (0, 2, 4)]
    accumulated, whole = make_variables([ONES, np.ones(3)]), make_variables([ONES, np.ones(3)])
    optimizer = Adafactor(0.25, gradient_accumulation_steps=2, **options)
    train(optimizer, accumulated, micro, compiled=False)
    train(Adafactor(0.25, **options), whole, mean, compiled=False)
    assert int(optimizer.iterations) == 3
    for a, b in zip(numbers(accumulated), numbers(whole), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5)


def test_fit_accumulates():
    half = compiled(Adafactor(0.1, gradient_accumulation_steps=2), batch_size=4).get_weights()
    whole = compiled(Adafactor(0.1), batch_size=8).get_weights()
    for a, b in zip(half, whole, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.skipif(not hasattr(keras.optimizers, "OptimizerMap"), reason="this Keras has none")
def test_multi_optimizer_gives_each_its_variables():
    model = small_model()
    kernels, biases = Adafactor(0.1), keras.optimizers.SGD(0.0)
    optimizers = keras.optimizers.OptimizerMap(default_optimizer=biases)
    optimizers[".*kernel"] = kernels
    before = model.get_weights()
    model.compile(keras.optimizers.MultiOptimizer(optimizers), "mse")
    fit(model)
    changed = [bool(np.any(a != b)) for a, b in zip(before, model.get_weights(), strict=True)]
    assert changed == ["kernel" in w.path for w in model.weights]
    assert sum(v.name.endswith("_row") for v in kernels.variables) == 2
