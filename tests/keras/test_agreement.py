"""Same numbers as the oracle and as ``keras.optimizers.Adafactor``, for every option, rank and dtype."""

import keras
import numpy as np
import pytest
from keras_support import SHAPES, make_variables, numbers, precise, problem, tensors, train
from tolerances import TOLERANCES

from adafactor import Factored, layout
from adafactor.core import reference
from adafactor.keras import Adafactor

STEPS = 50
TOLERANCE = TOLERANCES["keras"]


def expert_axis(path, shape):
    """The first axis of a stack of matrices is one of experts."""
    return Factored(rows=(1,), columns=tuple(range(2, len(shape))), batch=(0,)) if len(shape) > 2 else None


# Learning rates are powers of two: exact in every dtype.
OPTIONS = {
    "defaults": {},
    "larger learning rate": {"learning_rate": 0.25},
    "capped": {"learning_rate": 0.5, "relative_step": True},
    "uncapped": {"learning_rate": 0.5, "relative_step": False},
    "always capped": {"learning_rate": 0.5, "relative_step": "always"},
    "momentum": {"learning_rate": 0.125, "beta_1": 0.9},
    "beta_2_max": {"learning_rate": 0.125, "beta_2_max": 0.5},
    "beta_2_decay": {"learning_rate": 0.125, "beta_2_decay": -0.5},
    "epsilons": {"learning_rate": 0.125, "epsilon_1": 1e-3, "epsilon_2": 2.0},
    "no parameter scale": {"learning_rate": 0.125, "scale_parameter": False},
    "no clipping": {"learning_rate": 0.125, "clip_threshold": None},
    "tight clipping": {"learning_rate": 0.125, "clip_threshold": 0.25},
    "largest_two": {"learning_rate": 0.125, "factoring": "largest_two"},
    "smallest": {"learning_rate": 0.125, "factoring": "smallest"},
    "callable factoring": {"learning_rate": 0.125, "factoring": expert_axis},
    "callable factoring, momentum": {"learning_rate": 0.125, "factoring": expert_axis, "beta_1": 0.5},
    "min_dim_size_to_factor": {"learning_rate": 0.125, "min_dim_size_to_factor": 4},
    "weight decay": {"learning_rate": 0.125, "weight_decay": 0.25},
    "clipvalue": {"learning_rate": 0.125, "clipvalue": 0.5},
    "clipnorm": {"learning_rate": 0.125, "clipnorm": 1.0},
    "global_clipnorm": {"learning_rate": 0.125, "global_clipnorm": 1.0},
    "loss scale": {"learning_rate": 0.125, "loss_scale_factor": 1024.0},
}


def oracle(values, gradients, optimizer, options, dtype=np.float64, learning_rates=None):
    """The same run in NumPy; what Keras does around the step is done here too."""
    layouts = [
        layout(x.shape, optimizer.factoring, optimizer.min_dim_size_to_factor, name=f"v{i}")
        for i, x in enumerate(values)
    ]
    scheduled = learning_rates is not None
    oracles = [
        reference.Adafactor(each, optimizer.hyperparameters, dtype=dtype, scheduled=scheduled) for each in layouts
    ]
    values = [np.asarray(x, dtype) for x in values]
    for i, each in enumerate(gradients):
        lr = learning_rates[i] if scheduled else options.get("learning_rate", float(np.float32(0.001)))
        each = clipped([np.asarray(g, dtype) / options.get("loss_scale_factor", 1.0) for g in each], options)
        values = [x * (1 - lr * options.get("weight_decay", 0.0)) for x in values]
        values = [step.step(x, g, lr) for step, x, g in zip(oracles, values, each, strict=True)]
    return values, [array for step in oracles for array in slots(step.state)]


def slots(state):
    return [*state.second_moment.values(), *([] if state.momentum is None else [state.momentum])]


def clipped(gradients, options):
    norms = [np.sqrt(np.sum(g * g)) for g in gradients]
    if limit := options.get("clipvalue"):
        return [np.clip(g, -limit, limit) for g in gradients]
    if limit := options.get("clipnorm"):
        return [g * limit / max(norm, limit) for g, norm in zip(gradients, norms, strict=True)]
    if limit := options.get("global_clipnorm"):
        norm = np.sqrt(sum(norm**2 for norm in norms))
        return [g * limit / max(norm, limit) for g in gradients]
    return gradients


def worst(actual, expected):
    """The largest difference between two runs, relative to the largest element of each array."""
    pairs = [(a, b) for a, b in zip(actual, expected, strict=True) if b.size]
    return max(np.max(np.abs(a - b)) / np.max(np.abs(b)) for a, b in pairs)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_fifty_float64_steps_are_the_oracles(options):
    assert distance_from_oracle("float64", options) < TOLERANCE["float64"]


# Measured: at most 6e-7 on the three backends.
@pytest.mark.parametrize("name", ["defaults", "uncapped", "momentum", "smallest", "callable factoring", "weight decay"])
def test_fifty_float32_steps_are_the_oracles_but_for_rounding(name):
    assert distance_from_oracle("float32", OPTIONS[name]) < TOLERANCE["float32"]


def distance_from_oracle(dtype, options):
    values, gradients = rounded(*problem(steps=STEPS), dtype)
    with precise(dtype):
        optimizer = Adafactor(**options)
        variables = make_variables(values, dtype)
        train(optimizer, variables, gradients)
        moved, state = numbers(variables), numbers(optimizer.variables[2:])
    expected, expected_state = oracle(values, gradients, optimizer, options)
    return worst([*moved, *state], [*expected, *expected_state])


def rounded(values, gradients, dtype):
    return [x.astype(dtype) for x in values], [[g.astype(dtype) for g in each] for each in gradients]


@pytest.mark.parametrize("relative_step", [True, False, "always"])
@pytest.mark.parametrize("kind", ["schedule", "callable"])
def test_a_learning_rate_that_varies_is_capped_only_always(kind, relative_step):
    shapes = {"matrix": (3, 4), "vector": (5,)}
    values, gradients = rounded(*problem(shapes, steps=20), "float32")
    schedule = keras.optimizers.schedules.PiecewiseConstantDecay([4, 9], [0.5, 1.0, 0.25])
    rates = [0.5] * 5 + [1.0] * 5 + [0.25] * 10 if kind == "schedule" else [0.75] * 20
    optimizer = Adafactor(schedule if kind == "schedule" else lambda: 0.75, relative_step=relative_step)
    variables = make_variables(values)
    train(optimizer, variables, gradients)
    expected, _ = oracle(values, gradients, optimizer, {}, learning_rates=rates)
    assert worst(numbers(variables), expected) < TOLERANCE["float32"]


@pytest.mark.parametrize("options", [{}, {"beta_1": 0.9}], ids=["plain", "momentum"])
def test_eager_and_compiled_agree(options):
    values, gradients = problem({"scalar": (), "vector": (5,), "cube": (2, 3, 4)}, steps=3)
    moved = []
    for compiled in (False, True):
        variables = make_variables(values)
        train(Adafactor(0.125, **options), variables, gradients, compiled)
        moved.append(numbers(variables))
    assert worst(*moved) < 1e-6


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"learning_rate": 0.5},
        {"learning_rate": 0.125, "beta_2_decay": -0.5, "epsilon_1": 1e-6, "epsilon_2": 1.0, "clip_threshold": 0.5},
        {"learning_rate": 0.125, "weight_decay": 0.25, "global_clipnorm": 1.0},
        {"learning_rate": keras.optimizers.schedules.CosineDecay(2.0, 50)},
        {"learning_rate": 0.125, "use_ema": True, "ema_momentum": 0.75, "ema_overwrite_frequency": 10},
        {"learning_rate": 0.125, "gradient_accumulation_steps": 2},
    ],
    ids=["defaults", "capped", "paper's numbers", "around the step", "schedule", "moving average", "accumulation"],
)
def test_always_capped_is_keras_own_adafactor(options):
    # Keras's moving average cannot add empty tensors on TensorFlow.
    shapes = {name: shape for name, shape in SHAPES.items() if name != "empty" or "use_ema" not in options}
    values, gradients = rounded(*problem(shapes, steps=STEPS), "float32")
    moved = []
    for optimizer in (Adafactor(**options, relative_step="always"), keras.optimizers.Adafactor(**options)):
        variables = make_variables(values)
        train(optimizer, variables, gradients)
        moved.append(numbers(variables))
    assert worst(*moved) < TOLERANCES["keras.optimizers"]["float32"]


# One rounding per step to the variable's dtype, at random: a few units in the last place after ten steps.
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_low_precision_follows_the_oracle(dtype):
    values, gradients = problem(steps=10)
    variables = make_variables(values, dtype)
    values = numbers(variables)
    gradients = [numbers(tensors(each, dtype)) for each in gradients]
    optimizer = Adafactor(0.125)
    train(optimizer, variables, gradients)
    expected, _ = oracle(values, gradients, optimizer, {"learning_rate": 0.125})
    assert worst(numbers(variables), expected) < TOLERANCE[dtype]
