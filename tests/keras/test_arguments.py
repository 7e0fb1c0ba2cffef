"""The constructor, the configuration, and the contract of the state: names, order, shapes, dtypes."""

import json
import math
import subprocess
import sys

import keras
import numpy as np
import pytest
from keras_support import BACKEND, make_variables, numbers, tensors

from adafactor import Factored
from adafactor.keras import Adafactor

EVERYTHING = {
    "learning_rate": 0.5,
    "beta_2_decay": -0.5,
    "epsilon_1": 1e-20,
    "epsilon_2": 1e-2,
    "clip_threshold": None,
    "relative_step": "always",
    "weight_decay": 0.1,
    "clipnorm": None,
    "clipvalue": 1.0,
    "global_clipnorm": None,
    "use_ema": True,
    "ema_momentum": 0.9,
    "ema_overwrite_frequency": 3,
    "loss_scale_factor": 2.0,
    "gradient_accumulation_steps": 2,
    "name": "mine",
    "beta_1": 0.5,
    "beta_2_max": 0.99,
    "scale_parameter": False,
    "factoring": "smallest",
    "min_dim_size_to_factor": 3,
    "diagnostics": True,
}


@keras.saving.register_keras_serializable(package="tests")
def rows_are_all_but_the_last(path, shape):
    return Factored(rows=tuple(range(len(shape) - 1)), columns=(len(shape) - 1,)) if len(shape) > 1 else None


# -- refusals ----

REFUSED = {
    "learning_rate": (-0.1, math.nan, math.inf, None, "0.1", True),
    "beta_2_decay": (0.5, math.nan, -math.inf, None, "-0.8", True),
    "epsilon_1": (-1e-30, math.nan, math.inf, None, "1"),
    "epsilon_2": (-1e-3, math.nan, math.inf, None, "1"),
    "clip_threshold": (0, 0.0, -1.0, math.nan, math.inf, "1", True),
    "relative_step": (None, "never", 2, 1),
    "weight_decay": (-0.1, math.nan, math.inf, "1", True),
    "clipnorm": (0, -1.0, math.nan, math.inf, "1", True),
    "clipvalue": (0, -1.0, math.nan, math.inf, "1", True),
    "global_clipnorm": (0, -1.0, math.nan, math.inf, "1", True),
    "ema_momentum": (-0.1, 1.1, math.nan, None, "1"),
    "ema_overwrite_frequency": (0, -1, 2.5, "1", True),
    "loss_scale_factor": (0, -1.0, math.nan, math.inf, "1", True),
    "gradient_accumulation_steps": (0, 1, -2, 2.5, "2", True),
    "beta_1": (1.0, -0.1, math.nan, "0.9", True),
    "beta_2_max": (1.1, -0.1, math.nan, "0.9", True),
    "scale_parameter": (None, 1, "yes"),
    "factoring": (None, "last", 2, True),
    "min_dim_size_to_factor": (0, -1, 2.0, None, "8", True),
    "diagnostics": (None, 1, "yes"),
}


@pytest.mark.once
@pytest.mark.parametrize(("argument", "value"), [(name, value) for name, values in REFUSED.items() for value in values])
def test_a_refusal_says_argument_rule_value_and_remedy(argument, value):
    with pytest.raises((TypeError, ValueError)) as refusal:
        Adafactor(**{argument: value})
    text = str(refusal.value)
    assert text.startswith(f"{argument} must be ")
    rule, _, remedy = text.partition(f", got {value!r}. ")
    assert rule
    assert remedy.endswith(".")
    wrong_type = isinstance(refusal.value, TypeError)
    assert wrong_type or not isinstance(value, str) or argument in ("relative_step", "factoring")


@pytest.mark.once
def test_every_argument_but_the_name_and_a_flag_is_checked():
    assert EVERYTHING.keys() - REFUSED.keys() == {"name", "use_ema"}


@pytest.mark.once
def test_only_one_kind_of_gradient_clipping_is_allowed():
    with pytest.raises(ValueError, match="Only one of"):
        Adafactor(clipnorm=1.0, clipvalue=1.0)


@pytest.mark.once
def test_an_unknown_argument_is_refused():
    with pytest.raises(ValueError, match="not recognized"):
        Adafactor(beta_3=0.5)


@pytest.mark.once
def test_the_first_arguments_are_keras_own_in_its_order():
    import inspect

    theirs = list(inspect.signature(keras.optimizers.Adafactor.__init__).parameters.values())[1:-1]
    theirs[-1] = theirs[-1].replace(default=None)  # the name, "adafactor" in Keras 3.10
    ours = list(inspect.signature(Adafactor.__init__).parameters.values())[1:]
    assert [(p.name, p.default) for p in ours[: len(theirs)]] == [(p.name, p.default) for p in theirs]
    assert all(p.kind is p.KEYWORD_ONLY for p in ours[len(theirs) : -1])


@pytest.mark.once
def test_hyperparameters_are_attributes_that_cannot_be_set_by_mistake():
    optimizer = Adafactor(clip_threshold=2.0)
    assert optimizer.clip_threshold == optimizer.hyperparameters.clip_threshold == 2.0
    with pytest.raises(AttributeError):
        optimizer.hyperparameters = None
    with pytest.raises(AttributeError, match="no attribute 'beta_7'"):
        _ = optimizer.beta_7


@pytest.mark.once
@pytest.mark.parametrize("version", ["2.15.0", "3.9.2"])
def test_a_keras_that_is_too_old_is_refused_in_a_sentence(version):
    code = f"import keras; keras.__version__ = {version!r}; import adafactor.keras"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stderr.splitlines()[-1] == (
        f"ImportError: the version of Keras must be >= 3.10, got '{version}'. Run pip install -U keras."
    )


# -- configuration ----


def round_trips():
    return {
        "from_config": lambda o: Adafactor.from_config(o.get_config()),
        "json": lambda o: Adafactor.from_config(json.loads(json.dumps(o.get_config()))),
        "deserialize": lambda o: keras.optimizers.deserialize(keras.optimizers.serialize(o)),
        "get": lambda o: keras.optimizers.get(json.loads(json.dumps(keras.optimizers.serialize(o)))),
    }


@pytest.mark.once
@pytest.mark.parametrize("way", round_trips())
@pytest.mark.parametrize("factoring", ["smallest", rows_are_all_but_the_last], ids=["policy", "callable"])
def test_a_configuration_makes_an_equal_optimizer(way, factoring):
    optimizer = Adafactor(**EVERYTHING | {"factoring": factoring})
    again = round_trips()[way](optimizer)
    assert type(again) is Adafactor
    assert again.factoring == factoring
    assert again.hyperparameters == optimizer.hyperparameters
    assert again.get_config() == optimizer.get_config()
    assert again.get_config().keys() == EVERYTHING.keys()
    assert {k: v for k, v in again.get_config().items() if k != "factoring"} == {
        k: v for k, v in EVERYTHING.items() if k != "factoring"
    }


def test_a_schedule_survives_its_configuration():
    again = Adafactor.from_config(Adafactor(keras.optimizers.schedules.CosineDecay(0.5, 100)).get_config())
    assert float(again.learning_rate) == 0.5


@pytest.mark.once
def test_an_optimizer_is_found_by_its_registered_name():
    assert type(keras.optimizers.get("adafactor>Adafactor")) is Adafactor
    assert type(keras.optimizers.get("adafactor")) is keras.optimizers.Adafactor


@pytest.mark.once
def test_a_configuration_of_keras_own_adafactor_is_understood():
    config = keras.optimizers.Adafactor(0.5, clip_threshold=2.0, name="theirs").get_config()
    optimizer = Adafactor.from_config(config)
    assert (float(optimizer.learning_rate), optimizer.clip_threshold, optimizer.name) == (0.5, 2.0, "theirs")


@pytest.mark.once
def test_names_are_picked_like_those_of_keras():
    first, second, named = Adafactor(), Adafactor(), Adafactor(name="mine")
    assert (first.name, second.name, named.name) == ("adafactor", "adafactor_1", "mine")


# -- state ----


def test_the_order_of_the_state_is_a_contract():
    variables = make_variables([np.ones((2, 3)), np.ones(3), np.ones(())], names=["kernel", "bias", "gain"])
    optimizer = Adafactor(beta_1=0.5, use_ema=True, gradient_accumulation_steps=2)
    optimizer.build(variables)
    assert [(v.name, tuple(v.shape)) for v in optimizer.variables] == [
        ("iteration", ()),
        ("learning_rate", ()),
        ("kernel_average", (2, 3)),
        ("bias_average", (3,)),
        ("gain_average", ()),
        ("kernel_gradient_accumulator", (2, 3)),
        ("bias_gradient_accumulator", (3,)),
        ("gain_gradient_accumulator", ()),
        ("kernel_row", (2,)),
        ("kernel_column", (3,)),
        ("kernel_momentum", (2, 3)),
        ("bias_second_moment", (3,)),
        ("bias_momentum", (3,)),
        ("gain_second_moment", ()),
        ("gain_momentum", ()),
    ]
    assert not any(v.trainable for v in optimizer.variables)


def test_a_schedule_leaves_out_the_learning_rate():
    optimizer = Adafactor(lambda: 0.5)
    optimizer.build(make_variables([np.ones((2, 3))], names=["kernel"]))
    assert [v.name for v in optimizer.variables] == ["iteration", "kernel_row", "kernel_column"]


def test_variables_of_one_path_get_state_of_different_names():
    variables = make_variables([np.ones((2, 3)), np.ones((2, 3)), np.ones((3, 2))], names=["kernel"] * 3)
    optimizer = Adafactor(0.1, use_ema=True, gradient_accumulation_steps=2)
    optimizer.build(variables)
    paths = [v.path for v in optimizer.variables]
    assert len(set(paths)) == len(paths)
    assert [v.name for v in optimizer.variables[-2:]] == ["kernel_row_3", "kernel_column_3"]


def test_a_second_build_changes_nothing():
    optimizer = Adafactor(0.1)
    optimizer.build(make_variables([np.ones((2, 3))]))
    before = [v.path for v in optimizer.variables]
    optimizer.build(make_variables([np.ones(7)], names=["other"]))
    assert [v.path for v in optimizer.variables] == before


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_statistics_are_float32_and_the_step_is_an_integer(dtype):
    optimizer = Adafactor(beta_1=0.5)
    optimizer.build(make_variables([np.ones((2, 3)), np.ones(3)], dtype))
    step, *others = [keras.backend.standardize_dtype(v.dtype) for v in optimizer.variables]
    assert step == ("int64" if BACKEND == "tensorflow" else "int32")
    assert set(others) == {"float32"}


def test_a_factoring_callable_is_asked_with_path_and_shape():
    asked = []

    def factoring(path, shape):
        asked.append((path, shape))
        return rows_are_all_but_the_last(path, shape)

    with keras.name_scope("attention"):
        variables = make_variables([np.ones((2, 3, 4)), np.ones(4)], names=["kernel", "bias"])
    optimizer = Adafactor(0.1, factoring=factoring)
    optimizer.apply(tensors([np.ones((2, 3, 4)), np.ones(4)]), variables)
    assert asked == [("attention/kernel", (2, 3, 4)), ("attention/bias", (4,))]
    state = [(v.name, tuple(v.shape)) for v in optimizer.variables[2:]]
    assert state == [
        ("attention_kernel_row", (2, 3)),
        ("attention_kernel_column", (4,)),
        ("attention_bias_second_moment", (4,)),
    ]
    assert all((x < 1).all() for x in numbers(variables))


@pytest.mark.parametrize("answer", ["rows", Factored(rows=(0,)), Factored(rows=(0,), columns=(5,))], ids=str)
def test_an_impossible_factoring_is_refused_before_anything_is_created(answer):
    optimizer = Adafactor(factoring=lambda path, shape: answer)
    with pytest.raises((TypeError, ValueError), match="kernel"):
        optimizer.build(make_variables([np.ones((2, 3))], names=["kernel"]))
    assert not optimizer.built
    assert len(optimizer.variables) == 2


# -- numbers ----

ONE = {
    "np.float32": np.float32,
    "np 0-d": np.array,
    "np (1,)": lambda value: np.array([value]),
    "np (1, 1)": lambda value: np.array([[value]], "float32"),
}
NUMBERS = {name: value for name, value in EVERYTHING.items() if isinstance(value, float)}


@pytest.mark.once
@pytest.mark.parametrize("kind", ONE)
def test_numbers_may_be_numpys_and_the_configuration_has_pythons(kind):
    given = {name: ONE[kind](value) for name, value in NUMBERS.items()}
    counts = {"gradient_accumulation_steps": np.int64(2), "min_dim_size_to_factor": np.int32(3)}
    flags = {"scale_parameter": np.bool_(False), "diagnostics": np.bool_(True), "relative_step": np.bool_(True)}
    config = Adafactor(**given, **counts, **flags).get_config()
    json.dumps(config)
    for name, value in (NUMBERS | {name: value.item() for name, value in (counts | flags).items()}).items():
        assert config[name] == pytest.approx(value)
        assert type(config[name]) in (float, int, bool)


class Returning(keras.optimizers.schedules.LearningRateSchedule):
    """Whatever people's schedules return."""

    def __init__(self, make):
        self.make = make

    def __call__(self, step):
        return self.make()

    def get_config(self):
        return {}


RETURNED = ONE | {
    "float": float,
    "list": lambda value: [value],
    "tensor": lambda value: keras.ops.convert_to_tensor(value, "float32"),
    "tensor (1,)": lambda value: keras.ops.convert_to_tensor([value], "float32"),
    "bfloat16": lambda value: keras.ops.cast(value, "bfloat16"),
    "float16 (1, 1)": lambda value: keras.ops.convert_to_tensor([[value]], "float16"),
}
STEPS = {"plain": {}, "momentum": {"beta_1": 0.5}, "decay": {"weight_decay": 0.25}}


@pytest.mark.parametrize("way", [Returning, lambda make: make], ids=["schedule", "callable"])
@pytest.mark.parametrize("options", STEPS.values(), ids=STEPS)
@pytest.mark.parametrize("kind", RETURNED)
def test_a_schedule_may_return_an_array_of_one_number(kind, options, way):
    values = [np.ones((2, 3)), np.ones(3), np.ones(())]

    def moved(learning_rate, base=Adafactor):
        variables, optimizer = make_variables(values), base(learning_rate, relative_step=False, **options)
        optimizer.apply(tensors(values), variables)
        assert np.shape(optimizer.learning_rate) == ()
        return numbers(variables)

    class Extended(Adafactor):
        def update_step(self, gradient, variable, learning_rate):
            super().update_step(gradient, variable, learning_rate)

    learning_rate, expected = way(lambda: RETURNED[kind](0.125)), moved(0.125)
    for base in (Adafactor, Extended):
        for one, other in zip(moved(learning_rate, base), expected, strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-5)


def test_a_schedule_that_returns_several_numbers_is_refused():
    optimizer, variables = Adafactor(lambda: np.ones(2)), make_variables([np.ones((2, 3))])
    with pytest.raises(ValueError, match=r"learning_rate must be one number, got 'shape \(2,\)'\. Return a scalar"):
        optimizer.apply(tensors([np.ones((2, 3))]), variables)
