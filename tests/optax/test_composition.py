"""With the rest of optax, and with what JAX does to functions and to state."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax_support import assert_close, run

from adafactor import Factored
from adafactor.optax import adafactor


@pytest.fixture
def alone(params, grads):
    tx = adafactor(1e-2)
    return jax.jit(tx.update)(grads[0], tx.init(params), params)[0]


def first_update(tx, params, grads):
    return jax.jit(tx.update)(grads[0], jax.jit(tx.init)(params), params)[0]


def test_chain(params, grads, alone):
    chained = optax.chain(optax.clip_by_global_norm(1e9), adafactor(1e-2), optax.scale(2.0))
    assert_close(first_update(chained, params, grads), jax.tree.map(lambda u: 2 * u, alone))


def test_masked(params, grads, alone):
    updates = first_update(
        optax.masked(adafactor(1e-2), {**dict.fromkeys(params, False), "kernel": True}), params, grads
    )
    assert_close(updates, {**grads[0], "kernel": alone["kernel"]})


@pytest.mark.parametrize("combine", [optax.partition, optax.multi_transform])
def test_partition(combine, params, grads, alone):
    labels = {name: "a" if name == "stack" else "b" for name in params}
    updates = first_update(combine({"a": adafactor(1e-2), "b": optax.sgd(0.5)}, labels), params, grads)
    assert_close(updates["stack"], alone["stack"])
    assert_close(updates["bias"], -0.5 * grads[0]["bias"])


def test_multi_steps(params, grads, alone):
    tx = optax.MultiSteps(adafactor(1e-2), 2)
    state, update = tx.init(params), jax.jit(tx.update)
    updates, state = update(jax.tree.map(lambda g: g / 2, grads[0]), state, params)
    assert all(not leaf.any() for leaf in jax.tree.leaves(updates))
    updates, state = update(jax.tree.map(lambda g: 1.5 * g, grads[0]), state, params)
    assert_close(updates, alone)


def test_apply_if_finite(params, grads, alone):
    tx = optax.apply_if_finite(adafactor(1e-2), 3)
    state, update = tx.init(params), jax.jit(tx.update)
    broken = {**grads[0], "bias": grads[0]["bias"].at[3].set(jnp.inf)}
    updates, state = update(broken, state, params)
    assert all(not leaf.any() for leaf in jax.tree.leaves(updates))
    updates, state = update(grads[0], state, params)
    assert_close(updates, alone)


def test_tree_map_params(params):
    tx = adafactor(1e-2, momentum=0.9)
    state = tx.init(params)
    moved = optax.tree_map_params(tx, lambda a: a + 1, state, transform_non_params=lambda a: a + 7)
    assert int(moved.count) == 7
    assert all((leaf == 1).all() for leaf in jax.tree.leaves(moved[1:]))
    named = {name: name for name in params}
    label = lambda leaf, name: None if leaf is None else name  # noqa: E731
    labels = optax.tree_map_params(tx, label, state, named, is_leaf=lambda leaf: leaf is None)
    assert labels.row == {"kernel": "kernel", "stack": "stack", "bias": None, "scale": None}


def test_extra_arguments(params, grads):
    tx = adafactor(1e-2)
    assert isinstance(tx, optax.GradientTransformationExtraArgs)
    tx.update(grads[0], tx.init(params), params, value=1.0)


def test_eval_shape(params):
    tx = adafactor(1e-2, momentum=0.9)
    shapes, state = jax.eval_shape(tx.init, params), tx.init(params)
    assert jax.tree.structure(shapes) == jax.tree.structure(state)
    assert [(a.shape, a.dtype) for a in jax.tree.leaves(shapes)] == [(a.shape, a.dtype) for a in jax.tree.leaves(state)]


def test_state_holds_what_exists_and_nothing_else(params):
    state = adafactor(1e-2).init(params)
    assert state.count.dtype == jnp.int32
    assert state.momentum is None
    sizes = {"count": 1, "kernel": 160 + 200, "stack": 130 * 3 + 3 * 140, "bias": 30, "scale": 1}
    assert sum(leaf.size for leaf in jax.tree.leaves(state)) == sum(sizes.values())
    assert state.row["bias"] is None
    assert state.second_moment["kernel"] is None


def test_donation(params, grads):
    """Donated buffers are the results' buffers: the state's and the parameters' addresses stay."""
    tx = adafactor(1e-2)
    step = jax.jit(tx.step, donate_argnums=(0, 2))
    params, state = step(jax.tree.map(jnp.copy, params), grads[0], tx.init(params))
    before = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves((params, state))]
    params, state = step(params, grads[1], state)
    assert [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves((params, state))] == before


@pytest.mark.parametrize("form", ["update", "step"])
def test_no_temporary_as_large_as_a_parameter(form, path):
    tx = adafactor(1e-2)
    x = jnp.ones((1024, 1024))

    def step(params, state, g):
        if form == "step":
            return tx.step(params, g, state)
        updates, state = tx.update(g, state, params)
        return optax.apply_updates(params, updates), state

    compiled = jax.jit(step, donate_argnums=(0, 1)).lower(x, tx.init(x), x).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 0.05 * x.nbytes


@pytest.mark.parametrize("form", ["update", "step"])
def test_compiled_once(form, params, grads):
    tx = adafactor(lambda count: 1e-2 / (1 + count), momentum=0.9)
    function = jax.jit(getattr(tx, form))
    state = tx.init(params)
    for g in (*grads, grads[0]):
        if form == "step":
            params, state = function(params, g, state)
        else:
            updates, state = function(g, state, params)
            params = optax.apply_updates(params, updates)
    assert function._cache_size() == 1


def test_empty_and_absent_parameters():
    params = {"empty": jnp.zeros((0, 4)), "absent": None, "bias": jnp.ones(3)}
    tx = adafactor(1e-2)
    updates, state = jax.jit(tx.update)(params, tx.init(params), params)
    assert updates["empty"].shape == (0, 4)
    assert updates["absent"] is None
    jax.jit(tx.step)(params, params, state)


def test_one_layer_of_a_stack_leaves_the_others_alone(path, rng):
    """A gradient 100 times as large in one of 12 layers: with batch_axes the other updates are the same bits."""
    shapes = {"layers": (12, 64, 64), "head": (64, 8)}
    draw = lambda: {name: jnp.asarray(rng.standard_normal(shape), jnp.float32) for name, shape in shapes.items()}  # noqa: E731
    x, *history, g = (draw() for _ in range(5))
    loud = {**g, "layers": g["layers"].at[5].multiply(100.0)}
    others = np.arange(12) != 5
    for batch_axes, same in (({"layers": (0,), "head": ()}, True), ((), False)):
        tx = adafactor(1e-2, 8, batch_axes=batch_axes)
        state, update = tx.init(x), jax.jit(tx.update)
        for earlier in history:
            _, state = update(earlier, state, x)
        quiet, spoilt = update(g, state, x)[0]["layers"], update(loud, state, x)[0]["layers"]
        assert np.array_equal(spoilt[others], quiet[others]) == same
        limit = 1e-2 * np.sqrt(np.mean(np.square(x["layers"][5])))
        assert (np.sqrt(np.mean(np.square(spoilt[5]))) < 1.0001 * limit) == same


def test_specs_as_a_tree(rng):
    """Sets of axes: an attention kernel [embed, heads, head width] as one matrix."""
    x = {"attention": jnp.ones((32, 4, 8)), "other": {"a": jnp.ones((8, 8)), "b": jnp.ones(8)}}
    tx = adafactor(1e-2, factoring={"attention": Factored((0,), (1, 2)), "other": None})
    state = tx.init(x)
    assert state.row["attention"].shape == (32,)
    assert state.column["attention"].shape == (4, 8)
    assert state.second_moment["other"]["a"].shape == (8, 8)
    run(tx, x, [x])


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"decay_rate": -0.8}, "decay_rate must be >= 0 and finite, got -0.8"),
        ({"clipping_threshold": 0}, "clipping_threshold must be > 0 and finite, got 0. Pass None"),
        ({"momentum": 1.0}, "momentum must be >= 0 and < 1, got 1.0"),
        ({"decay_rate_max": 2.0}, "decay_rate_max must be >= 0 and <= 1, got 2.0"),
        ({"eps": "small"}, "eps must be a number, got 'small'"),
        ({"learning_rate": "fast"}, "learning_rate must be a number"),
        ({"factoring": "largest"}, 'factoring must be "last_two"'),
        ({"min_dim_size_to_factor": 0}, "min_dim_size_to_factor must be >= 1, got 0"),
        ({"dtype_momentum": "int8"}, "dtype_momentum must be a floating dtype, got 'int8'"),
        ({"factored": 1}, "factored must be True or False, got 1"),
    ],
)
def test_refusals(arguments, sentence):
    with pytest.raises((TypeError, ValueError)) as refusal:
        adafactor(**arguments)
    assert str(refusal.value).startswith(sentence)


def test_refusals_at_the_first_step(params, grads):
    tx = adafactor(1e-2)
    with pytest.raises(ValueError, match="params must be given to update"):
        tx.update(grads[0], tx.init(params))
    with pytest.raises(ValueError, match="a gradient must be of its parameter's shape"):
        tx.update({**grads[0], "bias": jnp.ones(31)}, tx.init(params), params)
    with pytest.raises(ValueError, match="a gradient must be of its parameter's shape"):
        tx.update(jnp.ones((0, 4)), tx.init(jnp.ones((0, 3))), jnp.ones((0, 3)))
    with pytest.raises(TypeError, match="of a real floating dtype, got 'int32'"):
        tx.init({"index": jnp.arange(3)})
