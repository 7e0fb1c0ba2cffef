"""Eight devices: where the state lives, how often a step compiles, what it communicates, and that numbers agree."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from optax_support import assert_close

from adafactor.optax import adafactor

pytestmark = pytest.mark.skipif(jax.device_count() < 8, reason="needs 8 devices")


def transformer(layers, width=16, hidden=32):
    rng = np.random.default_rng(0)
    layer = {"qkv": (width, 3 * width), "out": (width, width), "up": (width, hidden), "down": (hidden, width)}
    shapes = {"embedding": (64, width)}
    for k in range(layers):
        shapes |= {f"{k}/{name}": shape for name, shape in (layer | {"bias": (hidden,), "norm": (width,)}).items()}
    return {name: jnp.asarray(rng.standard_normal(shape), jnp.float32) for name, shape in shapes.items()}


def one_axis(name, x):
    """Megatron's: the axis that makes the pair of matrices meet in one sum. All over one mesh axis."""
    if x.ndim == 1:
        return P(None) if "norm" in name else P("x")
    return P("x", None) if name.split("/")[-1] in ("embedding", "out", "down") else P(None, "x")


def two_axes(name, x):
    return P("x", "y") if x.ndim == 2 else P(None)


SPECS = {"one": (one_axis, (8,)), "two": (two_axes, (4, 2))}


def spelt(spec, kind):
    """As compiled functions spell it, which do not keep what they were given: another spelling compiles again."""
    entries = list(spec)
    while kind == "Auto" and entries and entries[-1] is None:
        entries.pop()
    return P(*entries)


def place(params, kind, name):
    spec, shape = SPECS[name]
    mesh = jax.make_mesh(shape, ("x", "y")[: len(shape)], axis_types=(getattr(AxisType, kind),) * len(shape))
    shardings = {key: NamedSharding(mesh, spelt(spec(key, x), kind)) for key, x in params.items()}
    return mesh, shardings, jax.tree.map(jax.device_put, params, shardings)


def all_reduces(tx, params, state):
    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    text = jax.jit(step).lower(params, state, params).compile().as_text()
    assert not re.search(r" (all-gather|all-to-all|collective-permute|reduce-scatter)(-start)?\(", text)
    return len(re.findall(r" all-reduce(-start)?\(", text))


@pytest.mark.parametrize("jitted_init", [False, True], ids=["init", "jitted init"])
@pytest.mark.parametrize("mesh_shape", SPECS)
@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_placement_compilation_numbers(kind, mesh_shape, jitted_init):
    start = transformer(1)
    mesh, shardings, params = place(start, kind, mesh_shape)
    rng = np.random.default_rng(1)
    gradients = [jax.tree.map(lambda a: rng.standard_normal(a.shape).astype("float32"), start) for _ in range(5)]
    single = adafactor(1e-2, 4)
    expected, its_state, update = start, single.init(start), jax.jit(single.step)
    for g in gradients:
        expected, its_state = update(expected, g, its_state)
    with jax.set_mesh(mesh):
        for tx in (adafactor(1e-2, 4, shardings=shardings), adafactor(1e-2, 4)):
            step = jax.jit(tx.step, donate_argnums=(0, 2))
            state = (jax.jit(tx.init) if jitted_init else tx.init)(params)
            x = jax.tree.map(lambda a, s: jax.device_put(jnp.array(a), s), start, shardings)
            for name in ("0/qkv", "0/down", "embedding"):
                spec = (*shardings[name].spec, None, None)[:2]
                assert (*state.row[name].sharding.spec, None)[0] == spec[0]
                assert (*state.column[name].sharding.spec, None)[0] == spec[1]
            for g in gradients:
                x, state = step(x, jax.tree.map(jax.device_put, g, shardings), state)
            assert step._cache_size() == 1
            assert_close(x, expected)
            assert_close(state, its_state)


def test_all_reduces_of_twelve_layers():
    """One for the whole model on one mesh axis, three on two; without shardings XLA puts in one for every sum."""
    params = transformer(12)
    for mesh_shape, most in (("one", 1), ("two", 3)):
        mesh, shardings, placed = place(params, "Auto", mesh_shape)
        with jax.set_mesh(mesh):
            tx = adafactor(1e-2, 4, shardings=shardings)
            assert all_reduces(tx, placed, tx.init(placed)) <= most


def test_all_reduces_are_counted():
    """The count can fail: optax has more for a single layer."""
    mesh, _, placed = place(transformer(1), "Auto", "one")
    with jax.set_mesh(mesh):
        tx = optax.adafactor(1e-2, 4)
        assert all_reduces(tx, placed, tx.init(placed)) > 2


def test_experts_and_stacks():
    """Split batch axes need no sums of anybody; a split stack axis that is not a batch axis needs one more round."""
    rng = np.random.default_rng(2)
    x = {"experts": jnp.asarray(rng.standard_normal((8, 12, 10)), jnp.float32)}
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
    shardings = {"experts": NamedSharding(mesh, P("x"))}
    placed = jax.tree.map(jax.device_put, x, shardings)
    with jax.set_mesh(mesh):
        for batch_axes, count in (((0,), 0), ((), 1)):
            options = {"factoring": "last_two", "batch_axes": batch_axes}
            tx = adafactor(1e-2, 4, shardings=shardings, **options)
            single = adafactor(1e-2, 4, **options)
            assert all_reduces(tx, placed, tx.init(placed)) == count
            updates, _ = jax.jit(tx.update)(placed, tx.init(placed), placed)
            assert_close(updates, single.update(x, single.init(x), x)[0])


def test_meshes_must_be_the_same():
    x = {"a": jnp.ones((8, 8)), "b": jnp.ones((8, 8))}
    meshes = [jax.make_mesh(shape, ("x", "y"), axis_types=(AxisType.Auto,) * 2) for shape in ((8, 1), (4, 2))]
    shardings = {name: NamedSharding(mesh, P("x")) for name, mesh in zip(x, meshes, strict=True)}
    tx = adafactor(1e-2, 4, shardings=shardings)
    with pytest.raises(ValueError, match="the mesh of every parameter must be"):
        tx.update(x, adafactor(1e-2, 4).init(x), x)


def test_save_under_one_mesh_restore_under_another(tmp_path):
    checkpoint = pytest.importorskip("orbax.checkpoint")
    start = transformer(1)
    gradients = [jax.tree.map(lambda a, k=k: jnp.cos(a * k), start) for k in range(1, 5)]

    def advance(tx, params, state, shardings, gradients):
        step = jax.jit(tx.step)
        for g in gradients:
            params, state = step(params, jax.tree.map(jax.device_put, g, shardings), state)
        return params, state

    _, shardings, params = place(start, "Auto", "two")
    tx = adafactor(1e-2, 4, shardings=shardings)
    params, state = advance(tx, params, tx.init(params), shardings, gradients[:2])
    with checkpoint.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "saved", {"params": params, "state": state})
    expected, _ = advance(tx, params, state, shardings, gradients[2:])

    _, shardings, target = place(start, "Auto", "one")
    tx = adafactor(1e-2, 4, shardings=shardings)
    wanted = jax.tree.map(checkpoint.utils.to_shape_dtype_struct, {"params": target, "state": tx.init(target)})
    with checkpoint.StandardCheckpointer() as checkpointer:
        restored = checkpointer.restore(tmp_path / "saved", wanted)
    assert restored["state"].row["0/qkv"].sharding.spec == P()
    assert int(restored["state"].count) == 2
    got, _ = advance(tx, restored["params"], restored["state"], shardings, gradients[2:])
    assert_close(got, expected)
