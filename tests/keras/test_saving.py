"""A run that is saved, loaded and resumed equals the uninterrupted one bit for bit, in every format Keras has."""

import copy
import functools
import pickle
from typing import NamedTuple

import keras
import numpy as np
import pytest
from keras_support import BACKEND, numbers

from adafactor.keras import Adafactor

SCHEDULE = keras.optimizers.schedules.CosineDecay(0.5, 12)

OPTIONS = {
    "plain": {},
    "momentum": {"beta_1": 0.9},
    "moving average": {"use_ema": True, "ema_momentum": 0.5},
    "accumulation": {"gradient_accumulation_steps": 3},
    "schedule": {"learning_rate": SCHEDULE},
    "around the step": {"weight_decay": 0.01, "global_clipnorm": 1.0, "clip_threshold": None, "beta_2_max": 0.9},
    "smallest": {"factoring": "smallest", "beta_1": 0.5},
    "some unfactored": {"min_dim_size_to_factor": 5},
    "all at once": {
        "learning_rate": SCHEDULE,
        "beta_1": 0.9,
        "use_ema": True,
        "ema_overwrite_frequency": 2,
        "gradient_accumulation_steps": 3,
    },
    "float16": {"beta_1": 0.9, "use_ema": True, "gradient_accumulation_steps": 3},
    "bfloat16": {"beta_1": 0.9, "use_ema": True, "gradient_accumulation_steps": 3},
}


def compiled_model(options, dtype="float32", width=5):
    """Kernels of rank 3 and 2 and their biases. Names are fixed: ``set_state_tree`` goes by them."""
    keras.utils.set_random_seed(0)
    layers = [
        keras.Input((6, 3), dtype=dtype),
        keras.layers.Conv1D(8, 3, activation="tanh", dtype=dtype, name="convolution"),
        keras.layers.Flatten(dtype=dtype, name="flat"),
        keras.layers.Dense(width, activation="tanh", dtype=dtype, name="hidden"),
        keras.layers.Dense(2, dtype=dtype, name="output"),
    ]
    model = keras.Sequential(layers, name="model")
    model.compile(Adafactor(**{"learning_rate": 0.1, "name": "adafactor"} | options), keras.losses.MeanSquaredError())
    return model


def built(model):
    model.optimizer.build(model.trainable_variables)
    return model


def fit(model, epochs=1, **options):
    """Four steps an epoch: an accumulation of three is cut by the end of the first."""
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=(16, 6, 3)).astype("float32"), rng.normal(size=(16, 2)).astype("float32")
    model.fit(x, y, batch_size=4, epochs=epochs, shuffle=False, verbose=0, **options)


def everything(model):
    return numbers([*model.trainable_variables, *model.optimizer.variables])


def assert_same(actual, expected):
    for one, other in zip(actual, expected, strict=True):
        np.testing.assert_array_equal(one, other)


def load_weights(fresh, folder):
    model = built(fresh())
    model.load_weights(folder / "model.weights.h5")
    return model


def save_state_tree(model, folder):
    (folder / "tree").write_bytes(pickle.dumps(model.get_state_tree(value_format="numpy_array")))


def load_state_tree(fresh, folder):
    model = built(fresh())
    model.set_state_tree(pickle.loads((folder / "tree").read_bytes()))
    return model


def save_checkpoint(model, folder):
    import tensorflow as tf

    tf.train.Checkpoint(model=model, optimizer=model.optimizer).write(str(folder / "checkpoint"))


def load_checkpoint(fresh, folder):
    import tensorflow as tf

    model = built(fresh())
    checkpoint = tf.train.Checkpoint(model=model, optimizer=model.optimizer)
    checkpoint.read(str(folder / "checkpoint")).assert_existing_objects_matched().assert_consumed()
    return model


class Way(NamedTuple):
    save: object
    load: object


WAYS = {
    ".keras": Way(
        lambda model, folder: model.save(folder / "model.keras"),
        lambda fresh, folder: keras.saving.load_model(folder / "model.keras"),
    ),
    ".weights.h5": Way(lambda model, folder: model.save_weights(folder / "model.weights.h5"), load_weights),
    "state tree": Way(save_state_tree, load_state_tree),
    "pickle": Way(
        lambda model, folder: (folder / "pickle").write_bytes(pickle.dumps(model)),
        lambda fresh, folder: pickle.loads((folder / "pickle").read_bytes()),
    ),
    "legacy .h5": Way(  # last: Keras takes the optimizer out of the model's own configuration when it writes one
        lambda model, folder: model.save(folder / "model.h5"),
        lambda fresh, folder: built(keras.saving.load_model(folder / "model.h5")),
    ),
}
if BACKEND == "tensorflow":
    WAYS = {"tf.train.Checkpoint": Way(save_checkpoint, load_checkpoint)} | WAYS


class Run(NamedTuple):
    """One run: how it starts, what its halfway files are, and its numbers there and at its end."""

    name: str
    fresh: object
    folder: object
    halfway: list
    end: list


@pytest.fixture(scope="module", params=OPTIONS)
def run(request, tmp_path_factory):
    name = request.param
    dtype = name if name in ("float16", "bfloat16") else "float32"
    fresh = functools.partial(compiled_model, OPTIONS[name], dtype)
    folder = tmp_path_factory.mktemp("run")
    model = fresh()
    fit(model)
    halfway = everything(model)
    for way, (save, _) in WAYS.items():
        if possible(way, name):
            save(model, folder)
    fit(model)
    return Run(name, fresh, folder, halfway, everything(model))


def possible(way, name):
    """Keras writes no bfloat16 to a legacy file: h5py does not know it."""
    return (way, name) != ("legacy .h5", "bfloat16")


@pytest.mark.parametrize("way", WAYS)
def test_what_is_loaded_is_what_was_saved(run, way):
    if possible(way, run.name):
        assert_same(everything(WAYS[way].load(run.fresh, run.folder)), run.halfway)


def test_a_resumed_run_is_the_uninterrupted_one(run):
    model = WAYS[".keras"].load(run.fresh, run.folder)
    fit(model)
    assert_same(everything(model), run.end)


@pytest.mark.parametrize("way", [way for way in WAYS if way != ".keras"])
@pytest.mark.parametrize("run", ["all at once"], indirect=True)
def test_a_run_resumes_from_every_format(run, way):
    model = WAYS[way].load(run.fresh, run.folder)
    fit(model)
    assert_same(everything(model), run.end)


@pytest.mark.parametrize("name", ["momentum", "all at once"])
def test_a_deep_copy_trains_on_as_its_original(name):
    model = compiled_model(OPTIONS[name])
    fit(model)
    twin = copy.deepcopy(model)
    fit(model)
    fit(twin)
    assert_same(everything(twin), everything(model))


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("name", ["momentum", "accumulation", "schedule"])
def test_backup_and_restore_goes_on_where_it_was_interrupted(name, tmp_path):
    def stop(epoch, logs):
        if epoch == 1:
            raise Interrupted

    def backup():
        return keras.callbacks.BackupAndRestore(tmp_path / "backup")

    interrupted, resumed, whole = (compiled_model(OPTIONS[name]) for _ in range(3))
    with pytest.raises(Interrupted):
        fit(interrupted, 3, callbacks=[backup(), keras.callbacks.LambdaCallback(on_epoch_begin=stop)])
    fit(resumed, 3, callbacks=[backup()])
    fit(whole, 3)
    assert_same(everything(resumed), everything(whole))


def store_of(model):
    store = {}
    model.optimizer.save_own_variables(store)
    return store


def trained(options=None, width=5):
    model = compiled_model(options or {}, width=width)
    fit(model)
    return model


def test_state_of_another_version_is_refused_and_changes_nothing():
    model = trained()
    before = everything(model)
    with pytest.raises(
        ValueError, match=r"the state version of 'adafactor' must be 1, got 2\. Load it with the release"
    ):
        model.optimizer.load_own_variables(store_of(model) | {"state_version": np.asarray(2)})
    assert_same(everything(model), before)


def test_state_of_another_model_is_refused_and_changes_nothing():
    model = built(compiled_model({}, width=7))
    before = everything(model)
    with pytest.raises(
        ValueError, match=r"the saved adafactor/model_hidden_kernel_column must be of shape .*same model"
    ):
        model.optimizer.load_own_variables(store_of(trained()))
    assert_same(everything(model), before)


@pytest.mark.parametrize("options", [{"beta_1": 0.9}, {"use_ema": True}, {"learning_rate": SCHEDULE}])
def test_state_of_other_options_is_skipped_with_a_warning(options, tmp_path):
    trained().save_weights(tmp_path / "model.weights.h5")
    model = built(compiled_model(options))
    before = numbers(model.optimizer.variables)
    with pytest.warns(UserWarning, match="with the same options, before loading"):
        model.load_weights(tmp_path / "model.weights.h5")
    assert_same(numbers(model.optimizer.variables), before)


def test_a_legacy_file_on_another_model_warns_and_starts_afresh(tmp_path):
    trained().save(tmp_path / "model.h5")
    optimizer = keras.saving.load_model(tmp_path / "model.h5").optimizer
    with pytest.warns(UserWarning, match="it starts afresh"):
        optimizer.build(compiled_model({}, width=7).trainable_variables)
    assert int(optimizer.iterations) == 0
    assert not any(value.any() for value in numbers(optimizer.variables[2:]))


def test_an_optimizer_that_is_not_built_warns_and_loads_nothing(tmp_path):
    trained().save_weights(tmp_path / "model.weights.h5")
    model = compiled_model({})
    with pytest.warns(UserWarning, match="Skipping variable loading for optimizer 'adafactor'"):
        model.load_weights(tmp_path / "model.weights.h5")
    assert int(model.optimizer.iterations) == 0


def test_layers_load_without_the_optimizer_of_the_file(tmp_path):
    model = trained()
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras", compile=False)
    assert_same(numbers(loaded.variables), numbers(model.trainable_variables))
