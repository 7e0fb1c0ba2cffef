"""Trees of options: modules that can be called, prefixes, and what a tree does not say."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import optax
import pytest
from optax_support import assert_close

from adafactor import Factored
from adafactor.optax import adafactor


@jax.tree_util.register_dataclass
@dataclass
class Net:
    """A module with a ``__call__``, as Equinox has them, of any kind of leaf."""

    w: object
    b: object

    def __call__(self, x):
        return self.w @ x + self.b


PARAMS = Net(jnp.ones((4, 6)), jnp.ones(4))


def update(**options):
    tx = adafactor(1e-2, **options)
    updates, _ = tx.update(PARAMS, tx.init(PARAMS), PARAMS)
    jax.jit(tx.step)(PARAMS, PARAMS, tx.init(PARAMS))
    return updates


@dataclass
class Rule:
    """Something to call that is a tree of numbers as well."""

    least: int

    def __call__(self, path, shape):
        return Factored((0,), (1,)) if len(shape) == 2 and min(shape) >= self.least else None


jax.tree_util.register_dataclass(Rule)


@pytest.mark.parametrize("mask", [Net(True, False), lambda params: Net(True, False)], ids=["tree", "function"])
def test_a_mask_that_can_be_called_is_a_tree_unless_all_its_leaves_can(mask):
    expected = optax.adafactor(1e-2, weight_decay_rate=0.1, weight_decay_mask=mask)
    expected, _ = expected.update(PARAMS, expected.init(PARAMS), PARAMS)
    assert_close(update(weight_decay_rate=0.1, weight_decay_mask=mask), expected, 1e-5)


def test_a_mask_behind_inject_hyperparams():
    tx = optax.inject_hyperparams(adafactor, static_args=("weight_decay_mask", "min_dim_size_to_factor"))
    tx = tx(1e-2, weight_decay_rate=0.1, weight_decay_mask=Net(True, False))
    updates, _ = tx.update(PARAMS, tx.init(PARAMS), PARAMS)
    assert_close(updates, update(weight_decay_rate=0.1, weight_decay_mask=Net(True, False)))


@pytest.mark.parametrize(
    ("factoring", "rows"),
    [
        (Net(Factored((0,), (1,)), None), (4,)),
        (Net(None, None), None),
        (Net("last_two", "last_two"), None),  # by the default least side
        (Rule(4), (4,)),
        (Rule(5), None),
    ],
    ids=str,
)
def test_a_factoring_is_a_tree_if_its_leaves_are(factoring, rows):
    state = adafactor(factoring=factoring).init(PARAMS)
    assert (None if state.row.w is None else state.row.w.shape) == rows
    update(factoring=factoring)


def test_batch_axes_and_shardings_of_a_module():
    update(min_dim_size_to_factor=1, batch_axes=Net((0,), ()))
    mesh = jax.make_mesh((1,), ("x",))
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    assert_close(update(shardings=Net(everywhere, everywhere)), update())


@pytest.mark.parametrize(
    "options",
    [
        {"factoring": {"w": Factored((0,), (1,))}},
        {"batch_axes": {"b": ()}},
        {"weight_decay_rate": 0.1, "weight_decay_mask": {"w": True}},
    ],
    ids=str,
)
def test_a_tree_that_lacks_a_parameter_is_refused_by_its_name(options):
    params = {"w": jnp.ones((4, 6)), "b": jnp.ones(4)}
    argument, tx = list(options)[-1], adafactor(1e-2, **options)
    missing = "w" if argument == "batch_axes" else "b"
    with pytest.raises(
        ValueError, match=rf"{argument} must be a tree like the parameters, with an entry for {missing}"
    ):
        tx.update(params, tx.init(params), params)


def test_parameters_that_are_masked_out_may_have_an_entry():
    params = {"w": jnp.ones((4, 6)), "b": jnp.ones(4)}
    tx = adafactor(1e-2, factoring={"w": Factored((0,), (1,)), "b": None})
    tx = optax.masked(tx, {"w": False, "b": True})
    tx.update(params, tx.init(params), params)
