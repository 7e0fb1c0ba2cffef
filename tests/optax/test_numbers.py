"""What may stand for a number: NumPy's, JAX's, ml_dtypes' scalars, and arrays of one element."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from optax_support import assert_close

from adafactor.optax import adafactor

PARAMS = {"w": jnp.arange(30.0).reshape(6, 5) / 10, "b": jnp.ones(3), "s": jnp.float32(2)}
ONE = {
    "int": lambda v: round(v * 2) or 1,
    "np.float32": np.float32,
    "np 0-d": lambda v: np.array(v),
    "np (1,)": lambda v: np.array([v]),
    "np (1, 1)": lambda v: np.array([[v]], np.float32),
    "bfloat16": ml_dtypes.bfloat16,
    "jnp 0-d": jnp.asarray,
    "jnp (1,)": lambda v: jnp.array([v]),
    "jnp bfloat16": lambda v: jnp.asarray(v, "bfloat16"),
}
ARGUMENTS = {
    "learning_rate": 0.5,
    "decay_rate": 0.75,
    "decay_offset": 1.0,
    "clipping_threshold": 0.5,
    "momentum": 0.5,
    "weight_decay_rate": 0.5,
    "eps": 0.5,
    "decay_rate_max": 0.5,
    "min_parameter_scale": 0.5,
}


def updates(tx, steps=2):
    state = tx.init(PARAMS)
    for _ in range(steps):
        new, state = tx.update(PARAMS, state, PARAMS)
    return new


@pytest.mark.parametrize("kind", [kind for kind in ONE if kind != "int"])
def test_every_number_may_be_an_array_of_one(kind):
    plain = dict(ARGUMENTS) | {"decay_offset": 1}
    given = {name: ONE[kind](value) for name, value in ARGUMENTS.items()}
    tx = adafactor(**{"learning_rate": 0.5} | given)
    assert_close(updates(tx), updates(adafactor(**plain)))
    assert all(leaf.shape == PARAMS[name].shape for name, leaf in updates(tx, 1).items())


@pytest.mark.parametrize("argument", ["learning_rate", "weight_decay_rate"])
@pytest.mark.parametrize("kind", ONE)
def test_a_schedule_may_return_an_array_of_one(kind, argument):
    value = ONE[kind](0.5)
    options = {"learning_rate": 0.25} | {argument: lambda count: value}
    expected = {"learning_rate": 0.25} | {argument: float(np.asarray(value, np.float32).item())}
    assert_close(updates(adafactor(**options)), updates(adafactor(**expected)))
    jax.jit(adafactor(**options).step)(PARAMS, PARAMS, adafactor(**options).init(PARAMS))


@pytest.mark.parametrize("argument", ["learning_rate", "clipping_threshold", "momentum", "weight_decay_rate"])
def test_injected_hyperparameters_may_be_arrays_of_one(argument):
    tx = optax.inject_hyperparams(adafactor, static_args="min_dim_size_to_factor")
    options = {"learning_rate": 0.25} | {argument: 0.5}
    injected = tx(**options | {argument: jnp.array([0.5])})
    update = jax.jit(injected.update)
    new, _ = update(PARAMS, injected.init(PARAMS), PARAMS)
    assert_close(new, updates(adafactor(**options), 1))


@pytest.mark.parametrize("argument", ["learning_rate", "weight_decay_rate"])
def test_a_schedule_of_several_numbers_is_refused(argument):
    tx = adafactor(**{"learning_rate": 0.25} | {argument: lambda count: jnp.ones(2)})
    with pytest.raises(ValueError, match=rf"{argument} must be a schedule of one number, got \(2,\)"):
        updates(tx)


@pytest.mark.parametrize("argument", ["eps", "learning_rate", "momentum"])
def test_an_array_of_several_numbers_is_refused(argument):
    with pytest.raises(TypeError, match=f"{argument} must be a number"):
        adafactor(**{argument: np.array([0.5, 0.5])})


@pytest.mark.parametrize("argument", ["multiply_by_parameter_scale", "factored", "diagnostics", "relative_step"])
def test_flags_may_be_numpys(argument):
    assert_close(updates(adafactor(0.1, **{argument: np.bool_(False)})), updates(adafactor(0.1, **{argument: False})))


@pytest.mark.parametrize("axes", [np.int64(0), (np.int32(0),), [0]], ids=repr)
def test_axes_may_be_numpys(axes):
    params = {"w": jnp.ones((3, 4, 5))}
    state = adafactor(0.1, np.int32(1), batch_axes=axes).init(params)
    assert state.row["w"].shape == (3, 4)
