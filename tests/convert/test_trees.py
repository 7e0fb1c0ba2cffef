"""Trees of the JAX world in all their shapes: chains, wrappers, modules, T5X's axes."""

import equinox
import flax
import flax.nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from adafactor import Factored
from adafactor import layout as layout_of
from adafactor.convert import jax as jax_files
from adafactor.convert import msgpack
from adafactor.convert import torch as torch_files
from adafactor.convert.report import Report
from adafactor.convert.state import Parameter, State
from adafactor.core.errors import Refused
from adafactor.optax import adafactor

RNG = np.random.default_rng(0)
OPTIMIZERS = {"adafactor.optax": adafactor, "optax": optax.adafactor}
WRAPPERS = {
    "alone": lambda tx: tx,
    "chain": lambda tx: optax.chain(optax.clip_by_global_norm(1.0), tx),
    "masked": lambda tx: optax.masked(tx, lambda tree: jax.tree.map(lambda leaf: leaf.ndim > 0, tree)),
    "multi": lambda tx: optax.MultiSteps(tx, 2),
    "finite": lambda tx: optax.apply_if_finite(tx, 3),
    "schedule": lambda tx: optax.chain(optax.scale_by_schedule(lambda count: 1.0), tx),
}


class Module(equinox.Module):
    w: jax.Array
    layers: list


PARAMS = {
    "dict": {"a": jnp.ones((3, 4)), "b": {"c": jnp.ones((5,)), "d": jnp.ones(())}},
    "frozen": flax.core.freeze({"a": jnp.ones((3, 4)), "b": {"c": jnp.ones((5,))}}),
    "list": [jnp.ones((3, 4)), (jnp.ones((5,)),)],
    "module": Module(jnp.ones((3, 4)), [jnp.ones((5,)), jnp.ones((2, 2))]),
    "leaf": jnp.ones((3, 4)),
}


def trained(tx, params):
    """A state with a number of its own in every place, as four updates might have left it."""

    def number(leaf):
        if leaf.shape == (1,) or leaf.dtype == bool:  # optax's placeholders
            return leaf
        return (
            jnp.full_like(leaf, 4)
            if leaf.dtype == jnp.int32
            else jnp.asarray(RNG.uniform(1, 2, leaf.shape), leaf.dtype)
        )

    return jax.tree.map(number, tx.init(params))


@pytest.mark.parametrize("params", PARAMS.values(), ids=PARAMS)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_state_returns_through_every_kind_of_tree(name, params):
    tx = OPTIMIZERS[name](0.1, min_dim_size_to_factor=2, momentum=0.9)
    check(name, tx, params)


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_state_returns_through_every_wrapper(name, wrap):
    check(name, wrap(OPTIMIZERS[name](0.1, min_dim_size_to_factor=2)), PARAMS["dict"], exact=wrap is WRAPPERS["alone"])


def check(name, tx, params, exact=True):
    old, fresh = trained(tx, params), tx.init(params)
    state = jax_files.read({"params": params, "opt_state": old})
    assert state.optimizer == name
    report = Report()
    new = jax_files.write(state, name, template=fresh, report=report)
    assert report.exact
    assert jax.tree.structure(new) == jax.tree.structure(old)
    if exact:
        for one, other in zip(jax.tree.leaves(new), jax.tree.leaves(old), strict=True):
            assert one.dtype == other.dtype
            np.testing.assert_array_equal(np.asarray(one), np.asarray(other))
    again = jax_files.read({"params": params, "opt_state": new})
    assert again.count == state.count > 0
    for one, other in zip(again.parameters, state.parameters, strict=True):
        assert one.layout == other.layout
        for slot in one.slots:
            np.testing.assert_array_equal(one.slots[slot], other.slots[slot])


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_flax_nnx(name):
    model = flax.nnx.Linear(4, 6, rngs=flax.nnx.Rngs(0))
    optimizer = flax.nnx.Optimizer(model, OPTIMIZERS[name](0.1, min_dim_size_to_factor=2), wrt=flax.nnx.Param)
    params = flax.nnx.state(model, flax.nnx.Param)
    held = flax.nnx.as_pure(flax.nnx.state(optimizer))["opt_state"]
    found = jax_files.read({"params": flax.nnx.as_pure(params), "opt_state": held})
    assert {p.name: p.shape for p in found.parameters} == {"bias": (6,), "kernel": (4, 6)}


def test_injected_hyperparameters_follow():
    tx = optax.inject_hyperparams(optax.adafactor, static_args=("min_dim_size_to_factor", "factored"))(
        learning_rate=0.25, min_dim_size_to_factor=2
    )
    params = {"w": jnp.ones((4, 6))}
    state = jax_files.read({"params": params, "s": tx.init(params)}).with_hyperparameters({"learning_rate": 0.5})
    state = State(
        tuple(Parameter(p.name, p.layout, p.slots, 7) for p in state.parameters), state.groups, "jax", "optax"
    )
    new = jax_files.write(state, "optax", template=tx.init(params))
    assert float(new.hyperparams["learning_rate"]) == 0.5
    assert int(new.count) == int(new.inner_state[0].count) == 7


def test_without_parameters_a_matrix_is_ambiguous_in_optax():
    """v_row keeps the smaller axis, so (3, 4) and (4, 3) look alike."""
    tx = optax.adafactor(0.1, min_dim_size_to_factor=2)
    held = trained(tx, {"w": jnp.ones((4, 3))})
    with pytest.raises(Refused, match=r"shape of w must be told .*Pass shapes"):
        jax_files.read(held)
    found = jax_files.read(held, shapes={"w": (4, 3)}).parameters[0]
    assert found.layout == layout_of((4, 3))
    assert found.slots["row"].shape == (4,)
    assert jax_files.read(trained(tx, {"w": jnp.ones((3, 3))})).parameters[0].layout == layout_of((3, 3))


def test_the_axes_of_t5x_may_be_sets():
    """A kernel (embed, heads, kv) of T5X with embed as ROW, heads and kv as COLUMN."""
    axes = {"query": Factored((0,), (1, 2))}
    layout = layout_of((4, 2, 3), lambda *_: axes["query"])
    slots = {"row": np.arange(1, 5, dtype="f4"), "column": np.arange(1, 7, dtype="f4").reshape(2, 3)}
    state = State((Parameter("query", layout, slots, 5),), framework="jax")
    tree = jax_files.write(state, "t5x")
    each = tree["state"]["param_states"]["query"]
    np.testing.assert_array_equal(each["v_row"], slots["row"])
    np.testing.assert_array_equal(each["v_col"], slots["column"])
    for extra in ({"target": {"query": np.ones((4, 2, 3), "f4")}}, {}):
        options = {} if extra else {"shapes": {"query": (4, 2, 3)}, "axes": axes}
        found = jax_files.read({**tree, **extra}, **options)
        assert found.parameters[0].layout == layout
        assert found.count == 5
    kernel = torch_files.read(torch_files.write(found, "adafactor.torch")).parameters[0]
    assert kernel.layout == layout  # "smallest" cuts there


def test_large_arrays_of_t5x_are_elsewhere():
    none = np.zeros(1, "f4")
    each = {"v_row": {"driver": "zarr"}, "v_col": none, "v": none, "m": none}
    tree = {"state": {"step": 1, "param_states": {"w": each}}}
    with pytest.raises(Refused, match="restore the checkpoint with T5X and pass its tree"):
        jax_files.read(tree)


@pytest.mark.parametrize("tree", [{}, {"a": 1}, optax.adam(0.1).init({"a": jnp.ones(2)})])
def test_trees_without_adafactor(tree):
    with pytest.raises(Refused, match="the tree must be with the state of one Adafactor, got '0 of them'"):
        jax_files.read(tree)


def test_two_states_are_one_too_many():
    params = {"a": jnp.ones((2, 2))}
    with pytest.raises(Refused, match="got '2 of them'"):
        jax_files.read({"x": adafactor(0.1).init(params), "y": adafactor(0.1).init(params)})


def test_large_arrays_are_in_chunks_as_flax_has_them(tmp_path, monkeypatch):
    monkeypatch.setattr(msgpack, "_CHUNK", 40)
    tree = {"a": {"w": RNG.uniform(size=(5, 7)).astype("f4")}, "small": np.ones(3, "f4"), "count": np.int32(3)}
    msgpack.write(tree, tmp_path / "a.msgpack")
    data = (tmp_path / "a.msgpack").read_bytes()
    assert data.count(b"__msgpack_chunked_array__") == 1
    for back in (msgpack.read(tmp_path / "a.msgpack"), flax.serialization.msgpack_restore(data)):
        jax.tree.map(np.testing.assert_array_equal, back, tree)
