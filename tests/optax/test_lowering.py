"""Where the native kernels cannot be, or something goes wrong: the same numbers, and the operation has a name."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from native_support import need
from optax_support import assert_close

from adafactor import Factored
from adafactor.engine.xla import custom_call
from adafactor.optax import adafactor


@pytest.fixture
def tree():
    rng = np.random.default_rng(0)
    return {"w": jnp.asarray(rng.standard_normal((140, 150)), jnp.float32), "b": jnp.ones(3)}


def forms(tx):
    return {"update": lambda p, g, s: tx.update(g, s, p), "step": tx.step}


@pytest.mark.parametrize("form", ["update", "step"])
@pytest.mark.parametrize("options", [{}, {"momentum": 0.9, "clipping_threshold": None, "diagnostics": True}])
def test_without_jit(form, options, tree):
    tx = adafactor(0.1, **options)
    function, state = forms(tx)[form], tx.init(tree)
    expected = jax.jit(function)(tree, tree, state)
    with jax.disable_jit():
        assert_close(function(tree, tree, state), expected)
        stacked = jax.tree.map(lambda a: jnp.stack([a, a]), (tree, tree, state))
        assert_close(jax.vmap(function)(*stacked), jax.tree.map(lambda a: jnp.stack([a, a]), expected))


@pytest.mark.parametrize("form", ["update", "step"])
@pytest.mark.parametrize("setting", [jax.debug_nans, jax.debug_infs])
def test_what_is_not_finite_is_named(form, setting, tree):
    """A run that is finite passes, the infinite threshold of switched-off clipping too; a NaN ends in its operation."""
    tx = adafactor(0.1, clipping_threshold=None)
    function, state = forms(tx)[form], tx.init(tree)
    with setting(True):
        zeros = jax.tree.map(jnp.zeros_like, tree)  # 1/0 is selected away, and must not be seen either
        for gradients in (tree, zeros):
            function(tree, gradients, state)
            jax.jit(function)(tree, gradients, state)
    bad = tree | {"w": tree["w"].at[3, 4].set(jnp.nan if setting is jax.debug_nans else jnp.inf)}
    with setting(True), pytest.raises(FloatingPointError, match="encountered in"):
        jax.block_until_ready(jax.jit(function)(tree, bad, state))


@pytest.mark.parametrize("form", ["update", "step"])
@pytest.mark.parametrize("platforms", [None, ["tpu"], ["cpu", "cuda"]])
def test_export(form, platforms, tree):
    """What is exported goes to another machine: it holds no call of this one's library."""
    tx = adafactor(0.1)
    state = tx.init(tree)
    leaves, treedef = jax.tree.flatten((tree, tree, state))

    def flat(*leaves):
        return jax.tree.leaves(forms(tx)[form](*jax.tree.unflatten(treedef, leaves)))

    exported = export.export(jax.jit(flat), platforms=platforms)(*leaves)
    assert "adafactor_xla" not in exported.mlir_module()
    if platforms != ["tpu"]:
        assert_close(exported.call(*leaves), flat(*leaves))


def test_many_leaves_are_compiled_together(caplog):
    """Outside jit: one program of calls for all, and a few for each layout, not one for each leaf."""
    need(custom_call.why_not())
    tree = {f"leaf{k}": jnp.ones((k % 2 + 3, 5)) for k in range(60)}
    tx = adafactor(0.1, 1)
    state = tx.init(tree)
    jax.clear_caches()
    with jax.log_compiles(True):
        tx.update(tree, state, tree)
    compiled = [record for record in caplog.records if record.getMessage().startswith("Compiling")]
    assert 0 < len(compiled) < 40, [record.getMessage()[:60] for record in compiled]


def test_calls_are_of_a_bounded_size():
    """XLA's time for a call grows with the square of its operands."""
    need(custom_call.why_not())
    tx = adafactor(0.1, 1)
    tree = {f"leaf{k}": jnp.ones((4, 5)) for k in range(2 * custom_call.MOST + 1)}
    program = jax.jit(tx.step).lower(tree, tree, tx.init(tree)).as_text()
    assert program.count("@adafactor_xla_step") == 3


def test_a_layout_without_a_form_is_a_program_of_its_own():
    """Columns around rows: the kernels take the other parameters all the same."""
    need(custom_call.why_not())
    specs = {"odd": Factored(rows=(1,), columns=(0, 2)), "plain": Factored(rows=(0,), columns=(1,))}
    tx = adafactor(0.1, factoring=specs)
    tree = {"odd": jnp.ones((3, 4, 5)), "plain": jnp.ones((6, 7))}
    state = tx.init(tree)
    program = jax.jit(tx.step).lower(tree, tree, state).as_text()
    assert program.count("@adafactor_xla_step") == 1
    moved, _ = jax.jit(tx.step)(tree, tree, state)
    assert_close(moved, jax.tree.map(lambda a: 0.9 * a, tree))
