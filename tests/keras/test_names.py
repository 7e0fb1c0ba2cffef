"""Names of layers and variables: any that Keras takes, and those that do not decay, in files and copies."""

import copy
import json
import pickle
import re

import keras
import numpy as np
import pytest
from keras_support import make_variables, numbers, tensors

from adafactor.keras import Adafactor

# -- names ----

LAYERS = [
    ("block:0", "block:1"),
    ("my layer", "my layer 2"),
    ("a.b", "a_b"),
    ("äö", "日本"),
    ("a->b", "c[0]"),
    ("0:", ":0"),
]


def named_model(names):
    layers = [keras.layers.Dense(5, name=names[0]), keras.layers.Dense(3, name=names[1])]
    return keras.Sequential([keras.Input((6,)), *layers], name="model")


def usable(names):
    """Whether Keras itself trains and saves a model whose layers are called so: TensorFlow refuses some."""
    try:
        model = named_model(names)
        model.compile("sgd", "mse")
        model.fit(np.ones((4, 6)), np.ones((4, 3)), verbose=0)
    except Exception:
        return False
    return True


@keras.saving.register_keras_serializable(package="tests")
def whole(path, shape):
    ASKED.append(path)
    return None


ASKED = []


@pytest.mark.parametrize("names", LAYERS, ids=str)
def test_a_layer_may_have_any_name(names, tmp_path):
    if not usable(names):
        pytest.skip("Keras does not train it with SGD either")
    ASKED.clear()
    model = named_model(names)
    model.compile(Adafactor(0.1, factoring=whole, diagnostics=True), "mse")
    model.fit(np.ones((4, 6)), np.ones((4, 3)), verbose=0)
    paths = [f"model/{name}/{kind}" for name in names for kind in ("kernel", "bias")]
    assert ASKED == list(model.optimizer.diagnostics()) == paths
    model.save(tmp_path / "model.keras")
    again = keras.saving.load_model(tmp_path / "model.keras").optimizer
    for one, other in zip(numbers(again.saved_variables), numbers(model.optimizer.saved_variables), strict=True):
        np.testing.assert_array_equal(one, other)


def test_variables_of_one_path_have_diagnostics_of_their_own():
    variables = make_variables([np.ones((2, 3)), np.ones((3, 2)), np.ones(4)], names=["w", "w", "w_2"])
    optimizer = Adafactor(0.1, diagnostics=True)
    optimizer.apply(tensors([np.ones((2, 3)), np.zeros((3, 2)), np.ones(4)]), variables)
    found = optimizer.diagnostics()
    assert len(found) == 3
    assert [float(values["update_rms"]) for values in found.values()] == pytest.approx([1, 0, 1])


@pytest.mark.backend("tensorflow", reason="its own kind of variable")
@pytest.mark.parametrize("name", ["w", "w:1"])
def test_a_tf_variable_goes_by_its_name_without_the_number_of_its_output(name):
    import tensorflow as tf

    variable = tf.Variable(np.ones((2, 3), "float32"), name=name)
    optimizer = Adafactor(0.1, diagnostics=True)
    optimizer.apply(tensors([np.ones((2, 3))]), [variable])
    assert list(optimizer.diagnostics()) == [name]


# -- weight decay ----


def decaying(model):
    return [bool(model.optimizer._use_weight_decay(variable)) for variable in model.trainable_variables]


def undecayed(way, **options):
    optimizer = Adafactor(0.1, weight_decay=0.5, **options)
    optimizer.exclude_from_weight_decay(**way)
    model = named_model(("first", "second"))
    model.compile(optimizer, "mse")
    model.fit(np.ones((4, 6)), np.ones((4, 3)), verbose=0)
    return model


def saved(model, tmp_path):
    model.save(tmp_path / "model.keras")
    return keras.saving.load_model(tmp_path / "model.keras")


COPIES = {
    "saved": saved,
    "copied": lambda model, tmp_path: copy.deepcopy(model),
    "pickled": lambda model, tmp_path: pickle.loads(pickle.dumps(model)),
}


@pytest.mark.parametrize("way", COPIES)
@pytest.mark.parametrize("names", [["bias"], ["bias", "kern"], ("k.rnel",), ["nothing"]], ids=str)
def test_names_that_do_not_decay_are_part_of_the_configuration(names, way, tmp_path):
    model = undecayed({"var_names": names})
    assert decaying(model) == [not any(re.search(n, v.name) for n in names) for v in model.trainable_variables]
    assert decaying(COPIES[way](model, tmp_path)) == decaying(model)


def test_a_later_word_on_weight_decay_replaces_an_earlier_one():
    optimizer = Adafactor(0.1, weight_decay=0.5)
    optimizer.exclude_from_weight_decay(var_names=["bias"])
    optimizer.exclude_from_weight_decay(var_names=["kernel"])
    assert optimizer.get_config()["exclude_from_weight_decay"] == ["kernel"]
    optimizer.exclude_from_weight_decay()
    assert "exclude_from_weight_decay" not in optimizer.get_config()


def test_names_that_do_not_decay_go_through_a_wrapper_and_a_subclass():
    class Mine(Adafactor):
        pass

    for base in (Adafactor, Mine):
        inner = base(0.1, weight_decay=0.5)
        inner.exclude_from_weight_decay(var_names=["bias"])
        assert base.from_config(inner.get_config()).get_config() == inner.get_config()
    wrapper = keras.optimizers.LossScaleOptimizer(Adafactor.from_config(inner.get_config()))
    again = keras.optimizers.LossScaleOptimizer.from_config(json.loads(json.dumps(wrapper.get_config())))
    assert again.inner_optimizer.get_config() == inner.get_config()


def test_variables_that_do_not_decay_warn_when_they_are_saved(tmp_path):
    model = named_model(("first", "second"))
    optimizer = Adafactor(0.1, weight_decay=0.5)
    optimizer.exclude_from_weight_decay(var_list=iter([model.trainable_variables[0]]))
    model.compile(optimizer, "mse")
    model.fit(np.ones((4, 6)), np.ones((4, 3)), verbose=0)
    assert decaying(model) == [False, True, True, True]
    with pytest.warns(UserWarning, match="they decay in an optimizer made from it"):
        model.save(tmp_path / "model.keras")
    assert all(decaying(keras.saving.load_model(tmp_path / "model.keras")))
