"""What ``keras.optimizers.Adafactor`` gets wrong: every fault is shown on Keras's class, and gone on ours."""

import math

import keras
import numpy as np
import pytest
from keras_support import BACKEND, make_variables, numbers, tensors

from adafactor.keras import Adafactor

KERAS, OURS = keras.optimizers.Adafactor, Adafactor
both = pytest.mark.parametrize(("cls", "right"), [(KERAS, False), (OURS, True)], ids=["Keras's", "ours"])


def stepped(optimizer, values, gradients, dtype="float32", iteration=None):
    """A variable after one ``apply`` per gradient, as the ``iteration``-th update and on if given."""
    variables = make_variables([np.asarray(values)], dtype)
    optimizer.build(variables)
    if iteration is not None:
        set_iteration(optimizer, iteration)
    for gradient in gradients:
        optimizer.apply(tensors([gradient], dtype), variables)
    return numbers(variables)[0]


def set_iteration(optimizer, iteration):
    iterations = optimizer.variables[0]
    assert iterations.name == "iteration"
    iterations.assign(keras.ops.full((), iteration - 1, dtype=iterations.dtype))


@both
def test_no_state_variable_has_the_shape_of_a_matrix(cls, right):
    optimizer = cls()
    optimizer.build(make_variables([np.zeros((6, 7))]))
    assert ((6, 7) not in [tuple(v.shape) for v in optimizer.variables]) == right


@both
def test_relative_step_false_never_caps_the_learning_rate(cls, right):
    # At the hundredth update the cap is 0.1. The gradients' RMS is one, so the step is lr * RMS(x).
    options = {"learning_rate": 0.5, "relative_step": False}
    moved = stepped(cls(**options), np.ones((4, 4)), [np.ones((4, 4))] * 2, iteration=100)
    first = stepped(cls(**options), np.ones((4, 4)), [np.ones((4, 4))], iteration=100)
    assert np.allclose(moved, first * 0.5) == right


@both
def test_relative_step_changes_something(cls, right):
    def moved(relative_step):
        return stepped(cls(0.5, relative_step=relative_step), np.ones((2, 2)), [np.ones((2, 2))] * 10)

    assert np.any(moved(True) != moved(False)) == right


@both
@pytest.mark.parametrize("kind", ["schedule", "callable"])
def test_a_learning_rate_that_varies_by_itself_is_not_capped(cls, right, kind):
    def rate():
        return keras.optimizers.schedules.PiecewiseConstantDecay([10**6], [0.5, 0.1]) if kind == "schedule" else half

    def half():
        return 0.5

    two = stepped(cls(rate()), np.ones((4, 4)), [np.ones((4, 4))] * 2, iteration=100)
    one = stepped(cls(rate()), np.ones((4, 4)), [np.ones((4, 4))], iteration=100)
    assert np.allclose(two, one * 0.5) == right


# Where denormals are flushed to zero 1e4 is enough; where they are not, on PyTorch, it takes 1e8.
@both
@pytest.mark.parametrize("scale", [1e4, 1e8])
def test_a_row_without_gradient_beside_large_ones_stays_finite(cls, right, scale):
    gradient = np.full((8, 4), scale)
    gradient[0] = 0.0
    moved = stepped(cls(0.1), np.ones((8, 4)), [gradient] * 3)
    if scale == 1e8 or BACKEND != "torch" or right:
        assert np.isfinite(moved).all() == right
    if right:
        assert (moved[0] == 1.0).all()
        assert (moved[1:] < 1.0).all()


@both
@pytest.mark.parametrize("scale", [0.0, 1e-5])
@pytest.mark.parametrize("shape", [(4,), (3, 4)], ids=str)
def test_float16_stays_finite_with_tiny_gradients(cls, right, scale, shape):
    moved = stepped(cls(0.1), np.ones(shape), [np.full(shape, scale)] * 3, "float16")
    assert np.isfinite(moved).all() == right
    if right:
        assert (moved < 1.0).all() == (scale > 0)


@both
def test_float16_trains_past_step_65_504(cls, right):
    start = np.full((4,), 8.0)
    options = {"learning_rate": 0.5, "relative_step": True}  # the cap is 0.0039 there
    moved = stepped(cls(**options), start, [np.ones(4)] * 4, "float16", iteration=65_600)
    assert bool(np.all(moved < start)) == right


@both
@pytest.mark.parametrize("step", [5_000, 100_000])
@pytest.mark.parametrize("shape", [(4,), (3, 4)], ids=str)
def test_bfloat16_statistics_keep_moving(cls, right, step, shape):
    optimizer = cls(0.01)
    variables = make_variables([np.ones(shape)], "bfloat16")
    optimizer.build(variables)
    statistics = [v for v in optimizer.variables[2:] if v.shape == (shape if len(shape) == 1 else shape[:-1])][:1]
    for statistic in statistics:
        statistic.assign(keras.ops.ones(statistic.shape, statistic.dtype))
    set_iteration(optimizer, step)
    optimizer.apply(tensors([np.full(shape, 2.0)], "bfloat16"), variables)
    (moved,) = numbers(statistics)
    expected = 1 + 3 * step**-0.8  # from 1 towards 4, eq. 2
    assert np.allclose(moved, expected, rtol=1e-5) == right


@both
@pytest.mark.parametrize("shape", [(1, 3), (2, 1), (1, 1)], ids=str)
def test_a_gradient_that_would_broadcast_is_refused(cls, right, shape):
    optimizer, variables = cls(0.1), make_variables([np.ones((2, 3))])
    optimizer.build(variables)
    gradient = keras.ops.ones(shape)
    if not right:
        optimizer.apply([gradient], variables)
        assert (numbers(variables)[0] < 1).all()
        return
    with pytest.raises(ValueError, match=r"gradient of v0 must be of its variable's shape \(2, 3\)"):
        optimizer.apply([gradient], variables)
    assert (numbers(variables)[0] == 1).all()


BAD = {
    "beta_2_decay": (0.5, math.nan, None, "-0.8"),
    "epsilon_1": (-1e-30, math.nan, math.inf, None, "tiny"),
    "epsilon_2": (-1e-3, math.nan, math.inf, None, "tiny"),
    "clip_threshold": (0, -1.0, math.nan, "1"),
    "relative_step": (None, "never", 2),
    "weight_decay": (-0.1, math.nan, "no"),
    "ema_momentum": (1.5, math.nan, None),
    "loss_scale_factor": (0, -1.0, math.nan, "1"),
    "gradient_accumulation_steps": (2.5,),
    "clipnorm": (0, -1.0, math.nan, "1"),
}


@pytest.mark.once
@both
@pytest.mark.parametrize(("argument", "value"), [(name, value) for name, values in BAD.items() for value in values])
def test_the_constructor_refuses_what_makes_no_sense(cls, right, argument, value):
    if not right:
        cls(**{argument: value})  # accepted
        return
    with pytest.raises((TypeError, ValueError)) as refusal:
        cls(**{argument: value})
    assert argument in str(refusal.value)
    assert repr(value) in str(refusal.value)


@pytest.mark.once
@both
@pytest.mark.parametrize("rate", [-0.1, math.nan, math.inf])
def test_the_learning_rate_must_be_a_finite_number_from_0(cls, right, rate):
    if not right:
        cls(rate)
        return
    with pytest.raises(ValueError, match="learning_rate must be >= 0 and finite, got"):
        cls(rate)


def test_clip_threshold_none_switches_clipping_off():
    gradient = [np.ones((2, 2)), np.full((2, 2), 100.0)]  # the second one's update is far larger than one
    with pytest.raises((TypeError, ValueError, AttributeError)):
        stepped(KERAS(0.1, clip_threshold=None), np.ones((2, 2)), gradient)
    unclipped = stepped(OURS(0.1, clip_threshold=None), np.ones((2, 2)), gradient)
    barely = stepped(OURS(0.1, clip_threshold=1e6), np.ones((2, 2)), gradient)
    clipped = stepped(OURS(0.1), np.ones((2, 2)), gradient)
    np.testing.assert_array_equal(unclipped, barely)
    assert (unclipped < clipped).all()


@both
def test_an_integer_learning_rate_is_one(cls, right):
    if not right:
        with pytest.raises(ValueError, match="learning_rate"):
            cls(1)
        return
    assert float(cls(1).learning_rate) == 1.0


@both
def test_an_integer_variable_is_refused(cls, right):
    variables = [keras.Variable(np.ones(3), dtype="int32", name="count", trainable=BACKEND != "torch")]
    if right:
        with pytest.raises(ValueError, match="the dtype of count must be a floating-point dtype"):
            cls(0.1).build(variables)
    else:
        cls(0.1).build(variables)


@both
def test_state_variables_have_paths_of_their_own(cls, right):
    with keras.name_scope("first"):
        variables = make_variables([np.ones((2, 3)), np.ones(3)], names=["kernel", "bias"])
    with keras.name_scope("second"):
        variables += make_variables([np.ones((3, 2)), np.ones(2)], names=["kernel", "bias"])
    optimizer = cls(0.1)
    optimizer.build(variables)
    paths = [v.path for v in optimizer.variables]
    assert (len(set(paths)) == len(paths)) == right


def test_excluding_every_variable_from_weight_decay_works():
    def optimizer(cls):
        variable = make_variables([np.ones((2, 2))])
        made = cls(0.1, weight_decay=0.5)
        made.exclude_from_weight_decay(var_list=variable)
        made.apply(tensors([np.zeros((2, 2))]), variable)
        return numbers(variable)[0]

    assert (optimizer(OURS) == 1).all()
    if BACKEND == "torch":
        with pytest.raises(RuntimeError, match="at least one tensor"):
            optimizer(KERAS)


@both
@pytest.mark.backend("tensorflow", reason="its slices come one by one")
def test_an_embedding_row_that_was_looked_up_twice_has_one_gradient(cls, right):
    import tensorflow as tf

    values = np.arange(1.0, 10.0).reshape(3, 3)
    sliced, summed = make_variables([np.ones((4, 3))] * 2)
    gradient = tf.IndexedSlices(tf.constant(values, "float32"), tf.constant([2, 0, 2]), (4, 3))
    cls(0.25).apply([gradient], [sliced])
    cls(0.25).apply([tf.convert_to_tensor(gradient)], [summed])
    assert np.allclose(*numbers([sliced, summed]), rtol=1e-5) == right
