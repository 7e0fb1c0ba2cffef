"""Subclasses that override what Keras lets them override are called on every backend, whatever kernels there are."""

import types

import keras
import numpy as np
import pytest
from keras_support import make_variables, numbers, problem, train

from adafactor.keras import Adafactor

SHAPES = {"matrix": (3, 4), "vector": (5,), "cube": (2, 3, 4)}
OPTIONS = {
    "plain": {},
    "momentum": {"beta_1": 0.5},
    "decay": {"weight_decay": 0.25},
    "clipnorm": {"clipnorm": 1.0},
    "accumulation": {"gradient_accumulation_steps": 2},
    "schedule": {"learning_rate": keras.optimizers.schedules.CosineDecay(0.1, 12)},
}
VALUES, GRADIENTS = problem(SHAPES, steps=4)


def rated(base, rate):
    """A class whose learning rate differs from layer to layer."""

    class Rated(base):
        def update_step(self, gradient, variable, learning_rate):
            factor = rate if "matrix" in variable.name else 1.0
            super().update_step(gradient, variable, learning_rate * factor)

    return Rated


def trained(optimizer):
    variables = make_variables(VALUES, names=list(SHAPES))
    train(optimizer, variables, GRADIENTS)
    return numbers(variables)


def assert_close(actual, expected):
    for one, other in zip(actual, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_an_update_step_that_changes_nothing_changes_nothing(options):
    options = {"learning_rate": 0.1} | options
    assert_close(trained(rated(Adafactor, 1.0)(**options)), trained(Adafactor(**options)))


@pytest.mark.parametrize("name", [name for name in OPTIONS if name != "momentum"])
def test_a_subclass_of_ours_is_one_of_keras_own(name):
    options = {"learning_rate": 0.1} | OPTIONS[name]
    ours = rated(Adafactor, 0.25)(**options, relative_step="always")
    assert_close(trained(ours), trained(rated(keras.optimizers.Adafactor, 0.25)(**options)))


@pytest.mark.parametrize("options", [{}, {"beta_1": 0.5}], ids=["plain", "momentum"])
def test_a_learning_rate_of_zero_freezes_in_fit(options):
    layers = [keras.Input((6,)), keras.layers.Dense(5, name="matrix"), keras.layers.Dense(3, name="head")]
    model = keras.Sequential(layers)

    class Rated(Adafactor):
        def update_step(self, gradient, variable, learning_rate):
            path = getattr(variable, "path", variable.name)
            super().update_step(gradient, variable, learning_rate * (0.0 if "matrix" in path else 1.0))

    model.compile(Rated(0.1, **options), "mse")
    before = numbers(model.trainable_variables)
    model.fit(np.ones((4, 6)), np.ones((4, 3)), verbose=0)
    moved = [np.abs(a - b).max() > 0 for a, b in zip(numbers(model.trainable_variables), before, strict=True)]
    assert moved == [False, False, True, True]


def by_subclass(monkeypatch, name, method):
    return type("Extended", (Adafactor,), {name: method})(0.1, weight_decay=0.25)


def by_mixin(monkeypatch, name, method):
    return type("Extended", (type("Mixin", (), {name: method}), Adafactor), {})(0.1, weight_decay=0.25)


def by_instance(monkeypatch, name, method):
    optimizer = Adafactor(0.1, weight_decay=0.25)
    setattr(optimizer, name, types.MethodType(method, optimizer))
    return optimizer


def by_patch(monkeypatch, name, method):
    monkeypatch.setattr(Adafactor, name, method)
    return Adafactor(0.1, weight_decay=0.25)


@pytest.mark.parametrize("name", ["update_step", "assign", "_apply_weight_decay"])
@pytest.mark.parametrize("way", [by_subclass, by_mixin, by_instance, by_patch])
def test_whatever_replaces_a_method_of_one_variable_is_called(way, name, monkeypatch):
    called, own = [], getattr(Adafactor, name)

    def method(self, *args):
        called.append(name)
        return own(self, *args)

    plain = trained(Adafactor(0.1, weight_decay=0.25))
    extended = trained(way(monkeypatch, name, method))
    assert called
    assert_close(extended, plain)


def test_a_decay_of_ones_own_is_the_only_one():
    class Undecayed(Adafactor):
        def _apply_weight_decay(self, variables):
            pass

    assert_close(trained(Undecayed(0.1, weight_decay=0.25)), trained(Adafactor(0.1)))
