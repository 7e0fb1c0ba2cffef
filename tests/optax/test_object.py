"""The optimizer object where people put it: in pytrees, in modules, in copies."""

import copy
import pickle

import jax
import jax.numpy as jnp
import optax
import pytest

from adafactor.optax import adafactor

PARAMS = {"w": jnp.ones((6, 5)), "b": jnp.zeros(5)}


def schedule(count):
    return 1e-2 / (1 + count)


def through_equinox(tx):
    eqx = pytest.importorskip("equinox")

    class State(eqx.Module):
        params: dict
        tx: optax.GradientTransformation

    @eqx.filter_jit
    def step(state, tx):
        updates, _ = state.tx.update(PARAMS, tx.init(PARAMS), state.params)
        return State(optax.apply_updates(state.params, updates), state.tx)

    return step(State(PARAMS, tx), tx).tx


def through_partition(tx):
    eqx = pytest.importorskip("equinox")
    return eqx.combine(*eqx.partition(tx, eqx.is_array))


WAYS = {
    "pytree": lambda tx: jax.tree.map(lambda leaf: leaf, tx),
    "flatten": lambda tx: jax.tree.unflatten(*jax.tree.flatten(tx)[::-1]),
    "equinox": through_equinox,
    "equinox partition": through_partition,
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": lambda tx: pickle.loads(pickle.dumps(tx)),
    "replace": lambda tx: tx._replace(init=tx.init),
    "extra arguments": optax.with_extra_args_support,
    "static argument": lambda tx: (jax.jit(lambda t: t.init(PARAMS), static_argnums=0)(tx), tx)[1],
}


@pytest.mark.parametrize("way", WAYS)
def test_the_object_is_an_optimizer_afterwards_and_has_its_step(way):
    tx = adafactor(schedule, momentum=0.5)
    again = WAYS[way](tx)
    state = again.init(PARAMS)
    moved, _ = again.step(PARAMS, PARAMS, state)
    expected, _ = tx.step(PARAMS, PARAMS, tx.init(PARAMS))
    assert jax.tree.all(jax.tree.map(lambda a, b: (a == b).all(), moved, expected))
    again.update(PARAMS, state, PARAMS)


def test_equal_objects_compile_once():
    tx = adafactor(1e-2)
    step = jax.jit(lambda t, params: t.update(params, t.init(params), params)[0], static_argnums=0)
    step(tx, PARAMS), step(WAYS["pytree"](tx), PARAMS), step(copy.copy(tx), PARAMS)
    assert step._cache_size() == 1


def test_another_update_has_no_step_that_goes_past_it():
    tx = adafactor(1e-2)
    other = tx._replace(update=lambda *arguments: tx.update(*arguments))
    assert not hasattr(other, "step")
    with pytest.raises(AttributeError, match="call update"):
        _ = other.step
