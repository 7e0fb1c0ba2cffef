"""What gradients and variables may be: sparse, missing, of the wrong shape, empty, someone else's."""

import keras
import numpy as np
import pytest
from keras_support import BACKEND, fit, make_variables, numbers, small_model, tensors

from adafactor.keras import Adafactor

ONES, GRADIENT = np.ones((5, 3)), np.arange(1.0, 16.0).reshape(5, 3)
OPTIONS = {
    "plain": {},
    "momentum": {"beta_1": 0.5},
    "decay": {"weight_decay": 0.25},
    "clipnorm": {"clipnorm": 1.0},
    "global_clipnorm": {"global_clipnorm": 1.0},
    "clipvalue": {"clipvalue": 0.25},
    "loss scale": {"loss_scale_factor": 4.0},
    "accumulation": {"gradient_accumulation_steps": 2},
    "unclipped": {"clip_threshold": None, "scale_parameter": False},
}


def unchanged(optimizer, variables):
    """A check that neither the variables nor any state changed since."""
    before = numbers([*variables, *optimizer.variables])

    def check():
        for then, now in zip(before, numbers([*variables, *optimizer.variables]), strict=True):
            np.testing.assert_array_equal(now, then)

    return check


# -- sparse ----


def sparse(rows, values, shape):
    """The sparse gradient of an embedding table, with every row it looked up, twice if it did so."""
    if BACKEND == "tensorflow":
        import tensorflow as tf

        return tf.IndexedSlices(tf.constant(values, "float32"), tf.constant(rows, "int32"), shape)
    from jax.experimental.sparse import BCOO

    return BCOO((keras.ops.convert_to_tensor(values, "float32"), np.array(rows)[:, None]), shape=shape)


def dense(rows, values, shape):
    gradient = np.zeros(shape)
    np.add.at(gradient, rows, values)
    return gradient


@pytest.mark.backend("jax", "tensorflow", reason="PyTorch has no sparse gradients in Keras")
@pytest.mark.parametrize("rows", [[0, 2, 4], [2, 0, 2, 4, 2]], ids=["unique", "duplicates"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_sparse_gradients_equal_dense_ones(options, rows):
    rng = np.random.default_rng(0)
    a, b = make_variables([ONES]), make_variables([ONES])
    first, second = Adafactor(0.25, **options), Adafactor(0.25, **options)
    for _ in range(4):
        values = rng.normal(size=(len(rows), 3))
        first.apply([sparse(rows, values, (5, 3))], a)
        second.apply(tensors([dense(rows, values, (5, 3))]), b)
    for x, y in zip(numbers([*a, *first.variables]), numbers([*b, *second.variables]), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-7)


@pytest.mark.backend("jax", "tensorflow", reason="PyTorch has no sparse gradients in Keras")
def test_a_sparse_gradient_of_the_wrong_shape_is_refused():
    optimizer, variables = Adafactor(0.1), make_variables([ONES])
    with pytest.raises(ValueError, match=r"of its variable's shape \(5, 3\), got \(6, 3\)"):
        optimizer.apply([sparse([0], np.ones((1, 3)), (6, 3))], variables)
    assert not optimizer.built


def test_an_embedding_trains_in_fit():
    model = small_model(embedding=True)
    before = model.get_weights()[0]
    model.compile(Adafactor(0.1), "mse")
    losses = fit(model, epochs=6).history["loss"]
    assert losses[-1] < 0.8 * losses[0]
    assert np.isfinite(model.get_weights()[0]).all()
    assert np.any(model.get_weights()[0] != before)


# -- missing ----


def test_a_variable_without_gradient_is_left_alone():
    optimizer, variables = Adafactor(0.1, weight_decay=0.5), make_variables([ONES, ONES])
    optimizer.build(variables)
    state = [v for v in optimizer.variables if v.name.startswith("v1_")]
    assert len(state) == 2
    with pytest.warns(UserWarning, match="Gradients do not exist for variables"):
        optimizer.apply([*tensors([GRADIENT]), None], variables)
    first, second, *statistics = numbers([*variables, *state])
    assert (first < 1).all()
    assert (second == 1).all()
    assert all((s == 0).all() for s in statistics)


def test_no_gradient_at_all_is_refused():
    optimizer, variables = Adafactor(0.1), make_variables([ONES])
    optimizer.build(variables)
    check = unchanged(optimizer, variables)
    with pytest.raises(ValueError, match="No gradients provided"):
        optimizer.apply([None], variables)
    optimizer.apply([], [])  # Keras's own answer: nothing happens
    check()


# -- wrong ----


@pytest.mark.parametrize("shape", [(), (3,), (1, 3), (5, 1), (3, 5), (1, 5, 3), (15,)], ids=str)
@pytest.mark.parametrize("first", [True, False], ids=["alone", "second of two"])
def test_a_gradient_of_the_wrong_shape_changes_nothing(shape, first):
    values, gradients = ([ONES], []) if first else ([ONES, ONES], [GRADIENT])
    optimizer, variables = Adafactor(0.1, weight_decay=0.5), make_variables(values)
    optimizer.build(variables)
    check = unchanged(optimizer, variables)
    with pytest.raises(ValueError, match=r"the gradient of v\d must be of its variable's shape \(5, 3\), got "):
        optimizer.apply(tensors([*gradients, np.ones(shape)]), variables)
    check()


@pytest.mark.parametrize("given", [True, False], ids=["variables given", "built"])
@pytest.mark.parametrize("count", [1, 3])
def test_a_wrong_number_of_gradients_changes_nothing(count, given):
    optimizer, variables = Adafactor(0.1), make_variables([ONES, ONES])
    optimizer.build(variables)
    check = unchanged(optimizer, variables)
    with pytest.raises(ValueError, match=f"one gradient per variable, got {count}. There are 2 variables"):
        optimizer.apply(tensors([GRADIENT] * count), variables if given else None)
    check()


def test_an_unknown_variable_is_refused():
    optimizer, variables = Adafactor(0.1), make_variables([ONES])
    optimizer.build(variables)
    with pytest.raises(ValueError, match="Unknown variable"):
        optimizer.apply(tensors([GRADIENT]), make_variables([ONES], names=["other"]))


def test_apply_without_variables_needs_build():
    with pytest.raises(ValueError, match="must already be built"):
        Adafactor(0.1).apply(tensors([GRADIENT]))


def test_building_on_an_integer_variable_creates_nothing():
    count = keras.Variable(np.ones(3), dtype="int32", name="count", trainable=BACKEND != "torch")
    optimizer = Adafactor(0.1)
    with pytest.raises(ValueError, match="the dtype of count must be a floating-point dtype, got 'int32'"):
        optimizer.build([*make_variables([ONES]), count])
    assert not optimizer.built
    assert [v.name for v in optimizer.variables] == ["iteration", "learning_rate"]


# -- unusual ----


@pytest.mark.parametrize("options", [{}, {"beta_1": 0.5, "weight_decay": 0.1}], ids=["plain", "more"])
@pytest.mark.parametrize("shape", [(0,), (0, 3), (3, 0), (2, 0, 3)], ids=str)
def test_empty_variables_change_nothing_beside_others(shape, options):
    beside, alone = make_variables([np.zeros(shape), ONES]), make_variables([ONES])
    optimizer = Adafactor(0.1, **options)
    optimizer.apply(tensors([np.zeros(shape), GRADIENT]), beside)
    Adafactor(0.1, **options).apply(tensors([GRADIENT]), alone)
    np.testing.assert_array_equal(numbers(beside)[1], numbers(alone)[0])
    assert all(np.isfinite(x).all() for x in numbers(optimizer.variables))


def test_variables_that_are_their_gradient_are_assigned_and_keep_no_state():
    """As float8 training does with its scales."""
    scale, kernel = variables = make_variables([np.ones((2, 2)), ONES], names=["scale", "kernel"])
    scale.overwrite_with_gradient = True
    optimizer = Adafactor(0.1, weight_decay=0.1)
    optimizer.apply(tensors([np.full((2, 2), 7.0), GRADIENT]), variables)
    assert (numbers([scale])[0] == 7).all()
    assert (numbers([kernel])[0] < 1).all()
    assert [v.name for v in optimizer.variables[2:]] == ["kernel_row", "kernel_column"]


def test_a_float8_layer_trains():
    model = small_model()
    model.layers[0].quantize("float8")
    model.compile(Adafactor(0.1), "mse", jit_compile=False)
    losses = fit(model, epochs=4).history["loss"]
    assert losses[-1] < losses[0]
    assert not any("amax" in v.name or "scale" in v.name for v in model.optimizer.variables)


def test_constraints_hold_after_a_step():
    (variable,) = variables = make_variables([np.full((5, 3), 0.001)])
    variable.constraint = keras.constraints.NonNeg()
    Adafactor(1.0, scale_parameter=False).apply(tensors([GRADIENT]), variables)
    assert (numbers([variable])[0] == 0).all()


@pytest.mark.backend("tensorflow", reason="its own kind of variable")
@pytest.mark.parametrize("graph", [False, True], ids=["eager", "graph"])
def test_tf_variables_mix_with_keras_variables(graph):
    import tensorflow as tf

    ours, theirs = make_variables([ONES])[0], tf.Variable(ONES, dtype=tf.float32, name="theirs")
    optimizer = Adafactor(0.1, weight_decay=0.1)
    optimizer.build([ours, theirs])

    def step(gradients):
        optimizer.apply(gradients, [ours, theirs])

    step = tf.function(step) if graph else step
    for _ in range(2):
        step(tensors([GRADIENT, GRADIENT]))
    np.testing.assert_array_equal(numbers([ours])[0], theirs.numpy())
    assert [v.name for v in optimizer.variables[-2:]] == ["theirs_row", "theirs_column"]
    with pytest.raises(ValueError, match="the gradient of theirs must be"):
        optimizer.apply(tensors([GRADIENT, GRADIENT.T]), [ours, theirs])


@pytest.mark.backend("tensorflow", reason="a graph with shapes it does not know")
def test_gradients_of_unknown_shape_step_in_a_graph():
    import tensorflow as tf

    variables = make_variables([ONES])
    optimizer = Adafactor(0.1)
    optimizer.build(variables)
    step = tf.function(lambda g: optimizer.apply([g], variables), input_signature=[tf.TensorSpec(None, tf.float32)])
    step(*tensors([GRADIENT]))
    expected = make_variables([ONES])
    Adafactor(0.1).apply(tensors([GRADIENT]), expected)
    np.testing.assert_allclose(*numbers([*variables, *expected]), rtol=1e-6)
