"""Parameters in Flax's boxes, linen's ``Partitioned`` and nnx's ``Variable``, with names for the axes or without."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from optax_support import assert_close

from adafactor import Factored
from adafactor.optax import adafactor

pytestmark = pytest.mark.skipif(jax.device_count() < 8, reason="needs 8 devices")
nnx, linen = pytest.importorskip("flax.nnx"), pytest.importorskip("flax.linen")
meta = pytest.importorskip("flax.core.meta")
train_state = pytest.importorskip("flax.training.train_state")

X = jnp.asarray(np.random.default_rng(0).standard_normal((8, 128)), jnp.float32)
OPTIONS = {
    "plain": {},
    "momentum": {"momentum": 0.9},
    "diagnostics": {"diagnostics": True},
    "unfactored": {"factored": False},
}


def mesh(kind=AxisType.Auto):
    return jax.make_mesh((8,), ("m",), axis_types=(kind,))


# -- nnx ----


class Model(nnx.Module):
    def __init__(self, names, rngs):
        def named(init, *axes):
            return nnx.with_partitioning(init, names(*axes)) if names else init

        kernel, zeros = nnx.initializers.lecun_normal(), nnx.initializers.zeros_init()
        self.up = nnx.Linear(128, 256, kernel_init=named(kernel, None, "m"), bias_init=named(zeros, "m"), rngs=rngs)
        self.down = nnx.Linear(256, 128, kernel_init=named(kernel, "m", None), rngs=rngs)

    def __call__(self, x):
        return self.down(nnx.relu(self.up(x)))


def train_nnx(model, optimizer):
    @nnx.jit
    def step(model, optimizer):
        optimizer.update(model, nnx.grad(lambda m: jnp.mean((m(X) - 1) ** 2))(model))

    for _ in range(3):
        step(model, optimizer)
    return jax.tree.leaves(nnx.state(model, nnx.Param))


def tuple_of(*axes):
    return axes


def sharding_of(*axes):
    return NamedSharding(jax.sharding.get_abstract_mesh(), P(*axes))


@pytest.mark.parametrize(
    ("names", "options"), [*((tuple_of, name) for name in OPTIONS), (P, "plain"), (sharding_of, "plain")]
)
def test_an_nnx_model_with_named_axes_trains_as_without(names, options):
    def train(names):
        model = Model(names, nnx.Rngs(0))
        return train_nnx(model, nnx.Optimizer(model, adafactor(0.05, **OPTIONS[options]), wrt=nnx.Param))

    expected = train(None)
    with jax.set_mesh(mesh()):
        assert_close(train(names), expected, 1e-5)


def test_nnx_statistics_have_the_names_of_their_axes():
    with jax.set_mesh(mesh()):
        model = Model(tuple_of, nnx.Rngs(0))
        tx = adafactor(0.05, momentum=0.9, diagnostics=True)
        state = tx.init(nnx.state(model, nnx.Param))
    up, down = state.row["up"]["kernel"], state.column["up"]["kernel"]
    assert (up.get_value().shape, up.get_metadata("out_sharding")) == ((128,), (None,))
    assert (down.get_value().shape, down.get_metadata("out_sharding")) == ((256,), ("m",))
    assert state.momentum["up"]["kernel"].get_metadata("out_sharding") == (None, "m")
    assert state.second_moment["up"]["bias"].get_metadata("out_sharding") == ("m",)
    assert state.second_moment["up"]["kernel"].get_metadata("out_sharding") == ()
    assert state.diagnostics.update_rms["up"]["kernel"].get_metadata("out_sharding") == ()
    assert model.up.kernel.get_metadata("out_sharding") == (None, "m")


def test_nnx_follows_the_guide_for_sharded_models():
    """Model and optimizer made in one compiled function, and constrained there to their own specs."""
    tx = adafactor(0.05)

    @nnx.jit
    def create():
        model = Model(tuple_of, nnx.Rngs(0))
        optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
        for each in (model, optimizer):
            state = nnx.state(each)
            nnx.update(each, jax.lax.with_sharding_constraint(state, nnx.get_partition_spec(state)))
        return model, optimizer

    plain = Model(None, nnx.Rngs(0))
    expected = train_nnx(plain, nnx.Optimizer(plain, tx, wrt=nnx.Param))
    with jax.set_mesh(mesh()):
        model, optimizer = create()
        assert optimizer.opt_state.column["up"]["kernel"].get_value().sharding.spec == P("m")
        assert_close(train_nnx(model, optimizer), expected, 1e-5)


def test_nnx_takes_names_for_the_optimizers_own_variables():
    with jax.set_mesh(mesh()):
        init = nnx.with_partitioning(nnx.initializers.lecun_normal(), (None, None), optimizer_sharding=("m", None))
        model = nnx.Linear(128, 256, kernel_init=init, rngs=nnx.Rngs(0))
        optimizer = nnx.Optimizer(model, adafactor(0.05), wrt=nnx.Param)
    assert optimizer.opt_state.row["kernel"].get_metadata("out_sharding") == ("m",)
    assert optimizer.opt_state.column["kernel"].get_metadata("out_sharding") == (None,)


# -- linen ----


class Net(linen.Module):
    box: object

    @linen.compact
    def __call__(self, x):
        kernel, zeros = linen.initializers.lecun_normal(), linen.initializers.zeros_init()
        up = self.box(kernel, (None, "m")), self.box(zeros, ("m",))
        x = linen.relu(linen.Dense(256, kernel_init=up[0], bias_init=up[1], name="up")(x))
        return linen.Dense(128, kernel_init=self.box(kernel, ("m", None)), name="down")(x)


BOXES = {
    "partitioned": linen.with_partitioning,
    "logically": lambda init, names: linen.with_logical_partitioning(init, names, rules=(("m", "m"),)),
    "with its mesh": lambda init, names: linen.with_partitioning(init, names, mesh=mesh()),
}


def train_linen(state, step):
    for _ in range(3):
        state = step(state)
    return state


def linen_step(state):
    def loss(params):
        return jnp.mean((state.apply_fn({"params": params}, X) - 1) ** 2)

    return state.apply_gradients(grads=jax.grad(loss)(state.params))


@pytest.mark.parametrize(
    ("box", "options"),
    [*(("partitioned", name) for name in OPTIONS), ("logically", "plain"), ("with its mesh", "plain")],
)
def test_linen_follows_the_guide_for_sharded_models(box, options):
    """Abstract state, its shardings from the boxes, then jitted init and step with them."""
    tx = adafactor(0.05, **OPTIONS[options])

    def create(net):
        params = net.init(jax.random.key(0), X)["params"]
        state = train_state.TrainState.create(apply_fn=net.apply, params=params, tx=tx)
        return state.replace(step=jnp.int32(0))

    plain = Net(lambda init, names: init)
    expected = train_linen(jax.jit(create, static_argnums=0)(plain), jax.jit(linen_step)).params
    net = Net(BOXES[box])
    with jax.set_mesh(mesh()):
        shardings = linen.get_sharding(jax.eval_shape(lambda: create(net)), mesh())
        state = jax.jit(lambda: create(net), out_shardings=shardings)()
        step = jax.jit(linen_step, in_shardings=(shardings,), out_shardings=shardings)
        state = train_linen(state, step)
    assert_close(meta.unbox(state.params), expected, 1e-5)
    if options == "plain":
        assert state.opt_state.column["up"]["kernel"].names == ("m",)
        assert state.opt_state.row["up"]["kernel"].names == (None,)
        assert state.opt_state.second_moment["up"]["kernel"].names == ()
        assert state.opt_state.column["up"]["kernel"].value.sharding.spec == P("m")


def boxed():
    return {"kernel": meta.Partitioned(jnp.ones((4, 6)), ("a", "b")), "bias": jnp.ones(6)}


@pytest.mark.parametrize("form", ["update", "step"])
def test_a_state_in_boxes_keeps_its_structure(form):
    """As ``jax.lax.scan`` needs it."""
    tx, params = adafactor(0.1, 1, momentum=0.5), boxed()

    def step(carry, _):
        params, state = carry
        if form == "step":
            return tx.step(params, params, state), None
        updates, state = tx.update(params, state, params)
        return (optax.apply_updates(params, updates), state), None

    (moved, state), _ = jax.lax.scan(step, (params, tx.init(params)), None, 3)
    assert int(state.count) == 3
    bare = meta.unbox(params)
    (expected, _), _ = jax.lax.scan(step, (bare, tx.init(bare)), None, 3)
    assert_close(moved, expected)


def test_a_state_made_in_boxes_serves_parameters_without_and_the_other_way_round():
    tx, params = adafactor(0.1, 1, momentum=0.5), boxed()
    bare = meta.unbox(params)
    expected, _ = tx.update(bare, tx.init(bare), bare)
    assert_close(tx.update(bare, tx.init(params), bare)[0], expected)
    assert_close(tx.update(params, tx.init(bare), params)[0], expected)


# -- paths ----


def parameters(kind):
    layer = {"kernel": jnp.ones((4, 6)), "bias": jnp.ones(6)}
    if kind == "boxed":
        layer = {name: meta.Partitioned(x, (None,) * x.ndim) for name, x in layer.items()}
    if kind == "nnx":
        return nnx.State({name: {key: nnx.Param(x) for key, x in layer.items()} for name in ("a", "b")})
    return {"a": layer, "b": layer}


@pytest.mark.parametrize("kind", ["bare", "boxed", "nnx"])
def test_a_factoring_callable_sees_one_path_at_init_and_at_update(kind):
    seen = []

    def by_path(path, shape):
        seen.append((path, shape))
        return Factored((0,), (1,)) if path.endswith("kernel") else None

    params, tx = parameters(kind), adafactor(0.1, factoring=by_path)
    state = tx.init(params)
    at_init, seen[:] = list(seen), []
    tx.update(params, state, params)
    assert at_init == seen
    assert at_init == [(f"{a}/{b}", s) for a in "ab" for b, s in (("bias", (6,)), ("kernel", (4, 6)))]


@pytest.mark.parametrize("kind", ["bare", "boxed", "nnx"])
@pytest.mark.parametrize("wrapped", [dict, nnx.State], ids=["dict", "nnx.State"])
def test_a_tree_of_options_may_be_of_other_containers_than_the_parameters(kind, wrapped):
    layer = {"kernel": Factored((0,), (1,)), "bias": None}
    options = {
        "factoring": wrapped({"a": layer, "b": layer}),
        "weight_decay_rate": 0.5,
        "weight_decay_mask": wrapped({"a": {"kernel": True, "bias": False}, "b": False}),
    }
    params, tx = parameters(kind), adafactor(0.1, **options)
    state = tx.init(params)
    updates, _ = tx.update(params, state, params)
    decayed = [bool((leaf < -0.5).all()) for leaf in jax.tree.leaves(updates)]
    assert decayed == [False, True, False, False]
    batched = adafactor(0.1, 1, batch_axes=wrapped({"a": {"kernel": (0,), "bias": ()}, "b": ()}))
    state = batched.init(params)
    assert [leaf.shape for leaf in jax.tree.leaves((state.row, state.column))] == [(4,), (6,)]
    batched.update(params, state, params)
