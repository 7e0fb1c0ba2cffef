"""Several devices: the numbers of one, and statistics laid out as their variable less the reduced axis."""

import contextlib

import keras
import numpy as np
import pytest
from keras_support import numbers

from adafactor import Factored
from adafactor.keras import Adafactor

jax_only = pytest.mark.backend("jax", reason="keras.distribution works on JAX alone")
tensorflow_only = pytest.mark.backend("tensorflow", reason="tf.distribute is TensorFlow's")

OPTIONS = {
    "plain": {},
    "momentum and moving average": {"beta_1": 0.9, "use_ema": True, "ema_momentum": 0.5},
    "accumulation": {"gradient_accumulation_steps": 2},
    "largest_two": {"factoring": "largest_two", "weight_decay": 0.01},
    "smallest": {"factoring": "smallest", "beta_1": 0.5},
    "unfactored": {"min_dim_size_to_factor": 64},
}


def fitted(options, scope=None, optimizer=Adafactor, **compilation):
    """Kernels of rank 2 and 3 whose last axes divide by four; two epochs of four steps."""
    with scope or contextlib.nullcontext():
        keras.utils.set_random_seed(0)
        layers = [
            keras.Input((16,)),
            keras.layers.EinsumDense("ab,bcd->acd", (4, 8), bias_axes="d", activation="tanh", name="heads"),
            keras.layers.Flatten(),
            keras.layers.Dense(8, activation="tanh", name="hidden"),
            keras.layers.Dense(4, name="output"),
        ]
        model = keras.Sequential(layers, name="model")
        model.compile(optimizer(**{"learning_rate": 0.1} | options), keras.losses.MeanSquaredError(), **compilation)
    x, y = data()
    model.fit(x, y, batch_size=8, epochs=2, shuffle=False, verbose=0)
    return model


def data():
    rng = np.random.default_rng(1)
    return rng.normal(size=(32, 16)).astype("float32"), rng.normal(size=(32, 4)).astype("float32")


def difference(model, other):
    """Of all variables, relative to each one's largest element."""
    models = (numbers([*m.trainable_variables, *m.optimizer.variables]) for m in (model, other))
    return max(np.max(np.abs(a - b)) / max(np.max(np.abs(b)), 1e-30) for a, b in zip(*models, strict=True))


def mesh():
    return keras.distribution.DeviceMesh((2, 4), ("batch", "model"), keras.distribution.list_devices())


def model_parallel(**axes):
    """Every kernel is split over four devices, by a key that Keras's own class does not survive."""
    layouts = keras.distribution.LayoutMap(mesh())
    layouts[".*(hidden|output)/kernel"] = (None, "model")
    layouts[".*heads/kernel"] = (None, "model", None)
    layouts[".*bias"] = ("model",)
    return keras.distribution.ModelParallel(layout_map=layouts, batch_dim_name="batch")


def data_parallel():
    return keras.distribution.DataParallel(devices=keras.distribution.list_devices())


@jax_only
@pytest.mark.parametrize(
    ("distribution", "name"),
    [(data_parallel, "plain"), (data_parallel, "accumulation"), *((model_parallel, name) for name in OPTIONS)],
)
def test_numbers_are_those_of_one_device(distribution, name):
    alone = fitted(OPTIONS[name])
    keras.distribution.set_distribution(distribution())
    # The order of the sums differs.
    assert difference(fitted(OPTIONS[name]), alone) < 1e-6


def specs(optimizer):
    """The named axes of every state variable's actual sharding, with its trailing None."""
    return {
        variable.name: (tuple(variable.value.sharding.spec) + (None,) * 3)[: len(variable.shape)]
        for variable in optimizer.variables
    }


@jax_only
def test_row_and_column_are_laid_out_as_the_variable_less_the_reduced_axis():
    keras.distribution.set_distribution(model_parallel())
    state = specs(fitted({"beta_1": 0.9}).optimizer)
    assert state["model_hidden_kernel_row"] == (None,)
    assert state["model_hidden_kernel_column"] == ("model",)
    assert state["model_hidden_kernel_momentum"] == (None, "model")
    assert state["model_hidden_bias_second_moment"] == ("model",)
    assert state["model_heads_kernel_row"] == (None, "model")
    assert state["model_heads_kernel_column"] == (None, None)
    assert state["iteration"] == ()


def by_hand(path, shape):
    return Factored(rows=(0,), columns=(1, 2)) if len(shape) == 3 else None


@jax_only
@pytest.mark.parametrize(
    ("factoring", "row", "column"),
    [
        ("largest_two", (None, "model"), ("model", None)),
        ("smallest", (None,), ("model", None)),
        (by_hand, (None,), ("model", None)),
    ],
)
def test_every_factoring_keeps_the_layout_of_what_it_keeps(factoring, row, column):
    keras.distribution.set_distribution(model_parallel())
    state = specs(fitted({"factoring": factoring}).optimizer)
    assert (state["model_heads_kernel_row"], state["model_heads_kernel_column"]) == (row, column)


@jax_only
def test_averages_and_accumulators_are_laid_out_as_the_variable():
    keras.distribution.set_distribution(model_parallel())
    optimizer = fitted({"use_ema": True, "gradient_accumulation_steps": 2}).optimizer
    state = [
        v for v in optimizer.variables if v.name.endswith(("hidden_kernel_average", "kernel_gradient_accumulator"))
    ]
    assert state
    for variable in state:
        assert "model" in specs(optimizer)[variable.name]


def kernels_of_rank_two():
    layouts = keras.distribution.LayoutMap(mesh())
    layouts[".*kernel"] = (None, "model")
    return keras.distribution.ModelParallel(layout_map=layouts, batch_dim_name="batch")


def dense_model(optimizer):
    model = keras.Sequential([keras.Input((16,)), keras.layers.Dense(8), keras.layers.Dense(4)])
    model.compile(optimizer, "mse")
    return model


@jax_only
def test_a_layout_key_for_kernels_does_not_reach_into_the_optimizer():
    keras.distribution.set_distribution(kernels_of_rank_two())
    dense_model(Adafactor(0.1)).fit(*data(), batch_size=8, verbose=0)
    with pytest.raises((ValueError, IndexError)):
        dense_model(keras.optimizers.Adafactor(0.1)).fit(*data(), batch_size=8, verbose=0)


@jax_only
def test_a_distributed_run_resumes_bit_for_bit(tmp_path):
    keras.distribution.set_distribution(model_parallel())
    model = fitted({"beta_1": 0.9})
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert list(specs(loaded.optimizer).values()) == list(specs(model.optimizer).values())
    for each in (model, loaded):
        each.fit(*data(), batch_size=8, shuffle=False, verbose=0)
    assert difference(loaded, model) == 0


def mirrored():
    import tensorflow as tf

    return tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])


# Keras itself does not run gradient accumulation under a strategy, for any optimizer.
@tensorflow_only
@pytest.mark.parametrize("options", [OPTIONS[name] for name in OPTIONS if name != "accumulation"])
def test_a_mirrored_fit_is_that_of_one_device(options):
    assert difference(fitted(options, mirrored().scope()), fitted(options)) < 1e-6


@tensorflow_only
def test_state_is_mirrored_with_its_variable():
    from tensorflow.python.distribute.values import MirroredVariable

    model = fitted({"beta_1": 0.9}, mirrored().scope())
    assert all(isinstance(variable.value, MirroredVariable) for variable in model.optimizer.variables[2:])


@tensorflow_only
def test_a_mirrored_custom_loop_is_that_of_one_device():
    import tensorflow as tf

    def train(strategy):
        with strategy.scope():
            model = fitted({"beta_1": 0.9})
        x, y = data()
        batches = strategy.experimental_distribute_dataset(tf.data.Dataset.from_tensor_slices((x, y)).batch(8))

        def step(x, y):
            with tf.GradientTape() as tape:
                loss = tf.reduce_sum(tf.square(model(x) - y)) / 32
            gradients = tape.gradient(loss, model.trainable_variables)
            model.optimizer.apply(gradients, model.trainable_variables)

        run = tf.function(lambda x, y: strategy.run(step, (x, y)))
        for batch in batches:
            run(*batch)
        return model

    assert difference(train(mirrored()), train(tf.distribute.get_strategy())) < 1e-6
