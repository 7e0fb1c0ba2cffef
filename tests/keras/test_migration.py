"""Files of ``keras.optimizers.Adafactor`` load, and training goes on as it would have in Keras."""

import keras
import numpy as np
import pytest
from keras_support import BACKEND, numbers, precise

from adafactor.keras import Adafactor

SCHEDULE = keras.optimizers.schedules.CosineDecay(0.1, 40)

OPTIONS = {
    "plain": {},
    "moving average": {"use_ema": True, "ema_momentum": 0.5},
    "accumulation": {"gradient_accumulation_steps": 3},
    "schedule": {"learning_rate": SCHEDULE},
    "weight decay": {"weight_decay": 0.01, "clipnorm": 1.0},
    "other numbers": {"beta_2_decay": -0.6, "epsilon_1": 1e-12, "epsilon_2": 1e-2, "clip_threshold": 0.5},
}


@keras.saving.register_keras_serializable(package="tests")
class Scale(keras.layers.Layer):
    """Multiplies by one number: a variable of rank 0."""

    def build(self, shape):
        self.scale = self.add_weight(shape=(), initializer="ones", name="scale")

    def call(self, inputs):
        return inputs * self.scale


def every_rank():
    """Variables of rank 0 to 4."""
    layers = keras.layers
    return [
        keras.Input((6, 6, 2)),
        layers.Conv2D(4, 3, activation="tanh"),
        layers.Reshape((16, 4)),
        layers.Conv1D(3, 4, strides=4, activation="tanh"),
        layers.Flatten(),
        Scale(),
        layers.Dense(5, activation="tanh"),
        layers.Dense(2),
    ]


def only_matrices():
    """As many variables in a file of Keras's as in one of ours with momentum."""
    layers = keras.layers
    return [
        keras.Input((6, 6, 2)),
        layers.Flatten(),
        layers.Dense(5, use_bias=False, activation="tanh"),
        layers.Dense(2, use_bias=False),
    ]


def with_embedding():
    layers = keras.layers
    return [keras.Input((4,), dtype="int32"), layers.Embedding(11, 6), layers.Flatten(), layers.Dense(2)]


def compiled_model(layers, optimizer):
    keras.utils.set_random_seed(0)
    model = keras.Sequential(layers())
    compile_with(model, optimizer)
    return model


def compile_with(model, optimizer):
    model.compile(optimizer, keras.losses.MeanSquaredError(), auto_scale_loss=False)


def fit(model, steps):
    rng = np.random.default_rng(steps)
    shape = (4 * steps, *model.input_shape[1:])
    x = rng.integers(0, 11, shape) if len(shape) == 2 else rng.normal(size=shape)
    model.fit(x, rng.normal(size=(4 * steps, 2)), batch_size=4, shuffle=False, verbose=0)
    for variable in model.trainable_variables:  # or JAX refuses Keras's class a second fit with use_ema
        variable.assign(keras.ops.copy(variable))


def keras_run(layers, options, wrap=lambda optimizer: optimizer):
    """A model that trained seven steps with Keras's own class."""
    model = compiled_model(layers, wrap(keras.optimizers.Adafactor(**{"learning_rate": 0.1} | options)))
    fit(model, 7)
    return model


def ours(options):
    return Adafactor(**{"learning_rate": 0.1} | options, relative_step="always")


def from_keras_file(model, layers, optimizer, folder):
    """What ``docs/keras.md`` says."""
    model.save(folder / "old.keras")
    moved = keras.saving.load_model(folder / "old.keras")
    compile_with(moved, optimizer)
    moved.optimizer.build(moved.trainable_variables)
    moved.load_weights(folder / "old.keras")
    return moved


def from_weights_file(model, layers, optimizer, folder):
    model.save_weights(folder / "old.weights.h5")
    moved = compiled_model(layers, optimizer)
    moved.optimizer.build(moved.trainable_variables)
    moved.load_weights(folder / "old.weights.h5")
    return moved


def difference(model, other):
    """Of the trained variables, relative to each one's largest element."""
    pairs = zip(numbers(model.trainable_variables), numbers(other.trainable_variables), strict=True)
    return max(np.max(np.abs(a - b)) / np.max(np.abs(b)) for a, b in pairs)


@pytest.mark.parametrize(
    ("name", "move"), [("plain", from_keras_file), *((name, from_weights_file) for name in OPTIONS)]
)
def test_training_goes_on_as_it_would_have_in_keras(name, move, tmp_path):
    options = OPTIONS[name]
    with precise("float64"):
        keras.config.set_floatx("float64")
        keras.config.set_dtype_policy("float64")
        theirs = keras_run(every_rank, options)
        moved = move(theirs, every_rank, ours(options), tmp_path)
        assert difference(moved, theirs) == 0
        fit(theirs, 24)
        fit(moved, 24)
        assert difference(moved, theirs) < 1e-6
        assert int(moved.optimizer.iterations) == int(theirs.optimizer.iterations)


# On TensorFlow Keras's class counts a token that a batch repeats once per occurrence (test_deviations.py): there ours
# rightly goes another way.
EMBEDDING = [] if BACKEND == "tensorflow" else [with_embedding]


# Rounding of 24 float32 steps.
@pytest.mark.parametrize("layers", [every_rank, only_matrices, *EMBEDDING])
def test_float32_goes_on_too(layers, tmp_path):
    theirs = keras_run(layers, {})
    moved = from_weights_file(theirs, layers, ours({}), tmp_path)
    fit(theirs, 24)
    fit(moved, 24)
    assert difference(moved, theirs) < 1e-5


def state(optimizer):
    return {v.name: x for v, x in zip(optimizer.variables, numbers(optimizer.variables), strict=True)}


def test_row_and_column_are_taken_over_and_velocity_is_dropped(tmp_path):
    theirs = keras_run(only_matrices, {})
    moved = from_weights_file(theirs, only_matrices, ours({}), tmp_path)
    values = numbers(theirs.optimizer.variables)
    assert len(values) == 2 + 3 * 2
    kept = [values[i] for i in (0, 1, 2, 3, 5, 6)]
    for one, other in zip(numbers(moved.optimizer.variables), kept, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("layers", [every_rank, only_matrices])
def test_momentum_starts_at_zero(layers, tmp_path):
    theirs = keras_run(layers, {})
    optimizer = ours({"beta_1": 0.9})
    compiled = compiled_model(layers, optimizer)
    fit(compiled, 2)
    theirs.save_weights(tmp_path / "old.weights.h5")
    compiled.load_weights(tmp_path / "old.weights.h5")
    plain = from_weights_file(theirs, layers, ours({}), tmp_path).optimizer
    loaded = state(optimizer)
    momentums = [loaded.pop(name) for name in list(loaded) if name.endswith("_momentum")]
    assert len(momentums) == len(compiled.trainable_variables)
    assert not any(momentum.any() for momentum in momentums)
    for one, other in zip(loaded.values(), numbers(plain.variables), strict=True):
        np.testing.assert_array_equal(one, other)


def test_another_factoring_is_refused_and_changes_nothing(tmp_path):
    keras_run(every_rank, {}).save_weights(tmp_path / "old.weights.h5")
    model = compiled_model(every_rank, Adafactor(0.1, factoring="smallest"))
    model.optimizer.build(model.trainable_variables)
    before = numbers(model.optimizer.variables)
    with pytest.raises(ValueError, match=r'the factored axes of .*kernel must be .* Pass factoring="last_two"'):
        model.load_weights(tmp_path / "old.weights.h5")
    for one, other in zip(numbers(model.optimizer.variables), before, strict=True):
        np.testing.assert_array_equal(one, other)


def test_variables_that_are_no_longer_factored_are_taken_from_the_velocity(tmp_path):
    theirs = keras_run(only_matrices, {})
    moved = from_weights_file(theirs, only_matrices, ours({"min_dim_size_to_factor": 3}), tmp_path)
    velocity = numbers(theirs.optimizer.variables)[7]
    np.testing.assert_array_equal(numbers(moved.optimizer.variables)[4], velocity)


def test_a_file_of_another_model_is_skipped_with_a_warning(tmp_path):
    store = {}
    keras_run(every_rank, {}).optimizer.save_own_variables(store)
    model = compiled_model(only_matrices, ours({}))
    model.optimizer.build(model.trainable_variables)
    with pytest.warns(UserWarning, match="Skipping variable loading for optimizer 'adafactor"):
        model.optimizer.load_own_variables(store)
    assert int(model.optimizer.iterations) == 0


@pytest.mark.filterwarnings("ignore:Skipping variable loading for optimizer 'loss_scale")
@pytest.mark.parametrize("options", [{}, {"beta_1": 0.9}], ids=["plain", "momentum"])
@pytest.mark.parametrize("layers", [every_rank, only_matrices])
def test_inside_a_loss_scale_optimizer(layers, options, tmp_path):
    def scaled(optimizer):
        return keras.optimizers.LossScaleOptimizer(optimizer, initial_scale=4.0, dynamic_growth_steps=5)

    theirs = keras_run(layers, {}, scaled)
    assert float(theirs.optimizer.dynamic_scale) == 8
    moved = from_weights_file(theirs, layers, scaled(ours(options)), tmp_path)
    inner = state(moved.optimizer.inner_optimizer)
    assert inner["iteration"] == 7
    assert not any(value.any() for name, value in inner.items() if name.endswith("_momentum"))
    if not options:
        assert float(moved.optimizer.dynamic_scale) == 4
        fit(theirs, 24)
        fit(moved, 24)
        assert difference(moved, theirs) < 1e-5
