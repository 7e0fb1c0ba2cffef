"""Every optimizer that states are converted between, behind one interface, so that a run can move from any to any.

A run is fed gradients. Its parameters are arrays by name; where it has its state is the framework's business.
"""

import copy
import os

os.environ.setdefault("KERAS_BACKEND", "torch")

import jax
import jax.numpy as jnp
import keras
import numpy as np
import optax
import torch
from transformers.optimization import Adafactor as Transformers

from adafactor.convert import jax as jax_files
from adafactor.convert import keras as keras_files
from adafactor.convert import torch as torch_files
from adafactor.convert.report import Report
from adafactor.keras import Adafactor as OurKeras
from adafactor.optax import adafactor as our_optax
from adafactor.torch import Adafactor as OurTorch

#: The largest two axes are the last two, so that every optimizer factors over the same.
SHAPES = {
    "dense": (6, 4),
    "embedding": (5, 11),
    "square": (8, 8),
    "stack": (2, 3, 5),
    "kernel": (2, 2, 4, 6),
    "bias": (7,),
    "one": (1,),
    "scale": (),
}
#: The settings at which all of them compute the same: none caps below t = 10,000.
SETTINGS = {"learning_rate": 1e-2, "momentum": None, "scale": True}
#: Those with momentum agree while the step size is constant.
MOMENTUM = {"learning_rate": 1e-2, "momentum": 0.9, "scale": False}


def problem(steps, shapes=SHAPES, seed=0):
    """Starting values, and ``steps`` gradients of varying scale, float32."""
    rng = np.random.default_rng(seed)

    def draw(shape):
        return np.asarray(rng.standard_normal(shape), np.float32)

    start = {name: draw(shape) for name, shape in shapes.items()}
    scales = 10 ** rng.uniform(-2, 2, steps)
    return start, [{name: np.float32(scale) * draw(shape) for name, shape in shapes.items()} for scale in scales]


class Torch:
    def __init__(self, make, format, values):
        self.format = format
        self.params = {name: torch.nn.Parameter(torch.from_numpy(np.array(value))) for name, value in values.items()}
        self.optimizer = make(list(self.params.items()))

    def step(self, grads):
        for name, param in self.params.items():
            param.grad = torch.from_numpy(np.array(grads[name]))
        self.optimizer.step()

    def values(self):
        return {name: param.detach().numpy().copy() for name, param in self.params.items()}

    def state(self):
        return torch_files.read(self.optimizer)

    def take(self, state, report):
        self.optimizer.load_state_dict(torch_files.write(state, self.format, template=self.optimizer, report=report))


class Jax:
    def __init__(self, tx, update, format, values):
        self.format, self.update = format, update
        self.params = {name: jnp.asarray(value) for name, value in values.items()}
        self.held = tx.init(self.params)

    def step(self, grads):
        self.params, self.held = self.update(self.params, self.held, {name: grads[name] for name in self.params})

    def values(self):
        return {name: np.array(param) for name, param in self.params.items()}

    def state(self):
        return jax_files.read({"params": self.params, "opt_state": self.held})

    def take(self, state, report):
        self.held = jax_files.write(state, self.format, template=self.held, report=report)


class T5X:
    """T5X's ``apply_param_gradient`` over its tree, for matrices and what is not factored, as arrays of NumPy."""

    format = "t5x"

    def __init__(self, settings, values):
        self.settings = settings
        self.params = {name: value.copy() for name, value in values.items()}
        none = np.zeros((1,), np.float32)
        states = {}
        for name, value in values.items():
            each = dict.fromkeys(("v_row", "v_col", "v", "m"), none)
            if value.ndim >= 2:
                d1, d0 = self.dims(value)
                each |= {"v_row": np.zeros(np.delete(value.shape, d0), np.float32)}
                each |= {"v_col": np.zeros(np.delete(value.shape, d1), np.float32)}
            else:
                each["v"] = np.zeros(value.shape, np.float32)
            if settings["momentum"] is not None:
                each["m"] = np.zeros(value.shape, np.float32)
            states[name] = each
        self.held = {"step": np.zeros((), np.int32), "param_states": states}

    @staticmethod
    def dims(value):
        order = np.argsort(value.shape)
        return int(order[-2]), int(order[-1])

    def step(self, grads):
        t = int(self.held["step"]) + 1
        decay = np.float32(1 - float(t) ** -0.8)
        for name, x in self.params.items():
            s, g = self.held["param_states"][name], grads[name]
            scale = np.float32(self.settings["learning_rate"])
            if self.settings["scale"]:
                scale = scale * max(np.sqrt(np.mean(x * x)), np.float32(1e-3))
            square = g * g + np.float32(1e-30)
            new = dict(s)
            if x.ndim >= 2:
                d1, d0 = self.dims(x)
                new["v_row"] = decay * s["v_row"] + (1 - decay) * square.mean(axis=d0)
                new["v_col"] = decay * s["v_col"] + (1 - decay) * square.mean(axis=d1)
                mean = new["v_row"].mean(axis=d1 - 1 if d1 > d0 else d1, keepdims=True)
                y = g * np.expand_dims((new["v_row"] / mean) ** -0.5, d0) * np.expand_dims(new["v_col"] ** -0.5, d1)
            else:
                new["v"] = decay * s["v"] + (1 - decay) * square
                y = g * new["v"] ** -0.5
            y = scale * y / max(1, np.sqrt(np.mean(y * y)))
            beta = self.settings["momentum"]
            if beta is not None:
                y = new["m"] = np.float32(beta) * s["m"] + np.float32(1 - beta) * y
            self.held["param_states"][name] = {k: np.asarray(v, np.float32) for k, v in new.items()}
            self.params[name] = np.asarray(x - y, np.float32)
        self.held["step"] = np.asarray(t, np.int32)

    def values(self):
        return {name: value.copy() for name, value in self.params.items()}

    def state(self):
        return jax_files.read({"optimizer": {"target": self.params, "state": self.held}})

    def take(self, state, report):
        self.held = jax_files.write(state, "t5x", template={"state": self.held}, report=report)["state"]


class Keras:
    def __init__(self, optimizer, format, values):
        self.format, self.optimizer = format, optimizer
        self.params = {name: keras.Variable(value, name=name) for name, value in values.items()}
        self.optimizer.build(list(self.params.values()))

    def step(self, grads):
        tensors = [keras.ops.convert_to_tensor(grads[name]) for name in self.params]
        self.optimizer.apply(tensors, list(self.params.values()))

    def values(self):
        return {name: np.array(keras.ops.convert_to_numpy(value)) for name, value in self.params.items()}

    def state(self):
        return keras_files.read(self.optimizer)

    def take(self, state, report):
        keras_files.write(state, self.optimizer, report=report)


def runs(settings):
    """Constructors by format: ``make(values) -> run``. Those with momentum only, where the settings have it."""
    rate, momentum, scale = settings["learning_rate"], settings["momentum"], settings["scale"]
    shared = {"min_dim_size_to_factor": 2, "momentum": momentum, "multiply_by_parameter_scale": scale}
    made = {"optax": optax.adafactor(rate, **shared), "adafactor.optax": our_optax(rate, **shared)}
    updates = {name: jax.jit(_updater(tx)) for name, tx in made.items()}
    uncapped = {"relative_step": False, "scale_parameter": scale}

    def in_torch(make, format):
        return lambda values: Torch(make, format, values)

    def in_jax(name):
        return lambda values: Jax(made[name], updates[name], name, values)

    found = {
        "adafactor.torch": in_torch(lambda p: OurTorch(p, lr=rate, beta1=momentum, **uncapped), "adafactor.torch"),
        "adafactor.keras": lambda values: Keras(OurKeras(rate, beta_1=momentum, **uncapped), "adafactor.keras", values),
        "adafactor.optax": in_jax("adafactor.optax"),
        "torch.optim": in_torch(lambda p: torch.optim.Adafactor(p, lr=rate, eps=(1e-30, 1e-3)), "torch.optim"),
        "transformers": in_torch(lambda p: Transformers(p, lr=rate, beta1=momentum, **uncapped), "transformers"),
        "keras": lambda values: Keras(keras.optimizers.Adafactor(rate), "keras", values),
        "optax": in_jax("optax"),
        "t5x": lambda values: T5X(settings, values),
    }
    without = ("torch.optim", "keras") if momentum is not None or not scale else ()
    return {name: make for name, make in found.items() if name not in without}


def _updater(tx):
    def update(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return update


def difference(values, expected):
    """The largest over the parameters, relative to each one's largest element."""
    return max(
        float(np.max(np.abs(np.asarray(values[name], np.float64) - expected[name])) / np.max(np.abs(expected[name])))
        for name in expected
    )


def trained(make, start, gradients):
    run = make(start)
    for each in gradients:
        run.step(each)
    return run


def matrix(settings, steps=100, shapes=SHAPES):
    """By (source, target): the report, and how far the moved run ends from the one that never moved.

    Every source trains ``steps`` gradients; every target takes its parameters and state, and trains ``steps`` more.
    """
    start, gradients = problem(2 * steps, shapes)
    makers, found = runs(settings), {}
    for source, make in makers.items():
        stayed = trained(make, start, gradients[:steps])
        told = {"learning_rate": settings["learning_rate"], "scale_parameter": settings["scale"]}
        values, state = copy.deepcopy(stayed.values()), stayed.state().with_hyperparameters(told)
        for each in gradients[steps:]:
            stayed.step(each)
        for target, other in makers.items():
            if target == source:
                continue
            moved, report = other(values), Report()
            moved.take(state, report)
            for each in gradients[steps:]:
                moved.step(each)
            found[source, target] = report, difference(moved.values(), stayed.values())
    return found
