"""A state that does not fit is refused in one sentence, whoever made it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from adafactor import Factored
from adafactor.optax import AdafactorState, adafactor

PARAMS = {"w": jnp.ones((6, 5)), "s": jnp.ones((4, 4)), "b": jnp.ones(5)}
OPTIONS = {"learning_rate": 0.1, "min_dim_size_to_factor": 2}


def made(params=PARAMS, **options):
    return adafactor(**OPTIONS | options).init(params)


def theirs():
    return optax.adafactor(0.1, min_dim_size_to_factor=2).init(PARAMS)


def stacked(state):
    return jax.tree.map(lambda a: jnp.stack([a, a]), state)


FOREIGN = {
    "optax's": theirs,
    "optax's inner": lambda: theirs()[0],
    "Adam's": lambda: optax.adam(0.1).init(PARAMS),
    "a dictionary": lambda: made()._asdict(),
    "a list": lambda: list(made()),
    "a bare tuple": lambda: tuple(made()),
    "of a chain": lambda: (made(), optax.EmptyState()),
    "nothing": lambda: None,
    "the parameters": lambda: PARAMS,
}
UNFIT = {
    "unfactored": lambda: made(factored=False),
    "other sides": lambda: made(min_dim_size_to_factor=5),
    "other axes": lambda: made(factoring=lambda path, shape: Factored((1,), (0,)) if len(shape) == 2 else None),
    "batch axes": lambda: made(min_dim_size_to_factor=1, batch_axes=(0,)),
    "momentum not asked": lambda: made(momentum=0.5),
    "diagnostics not asked": lambda: made(diagnostics=True),
    "other parameters": lambda: made({"w": PARAMS["w"], "b": PARAMS["b"]}),
    "more parameters": lambda: made(PARAMS | {"c": jnp.ones(3)}),
    "renamed parameters": lambda: made({"w": PARAMS["w"], "s": PARAMS["s"], "c": PARAMS["b"]}),
    "larger parameters": lambda: made(PARAMS | {"w": jnp.ones((7, 5))}),
    "stacked": lambda: stacked(made()),
    "stacked but the count": lambda: stacked(made())._replace(count=jnp.int32(0)),
    "a row gone": lambda: (lambda s: s._replace(row=s.row | {"w": None}))(made()),
    "rows gone": lambda: made()._replace(row=None),
    "a row flat": lambda: (lambda s: s._replace(row=s.row | {"w": jnp.zeros((6, 1))}))(made()),
    "a count of floats": lambda: made()._replace(count=jnp.float32(0)),
    "swapped row and column": lambda: (lambda s: s._replace(row=s.column, column=s.row))(made()),
}


def attempt(tx, form, state):
    before = jax.tree.map(np.array, state)
    forms = {
        "update": lambda: tx.update(PARAMS, state, PARAMS),
        "jit": lambda: jax.jit(tx.update)(PARAMS, state, PARAMS),
        "step": lambda: tx.step(PARAMS, PARAMS, state),
    }
    with pytest.raises((TypeError, ValueError)) as refusal:
        forms[form]()
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), before, state))
    text = str(refusal.value)
    assert text.startswith(("state", "the state of parameter"))
    assert " must be " in text
    assert "init(params)" in text
    assert "adafactor convert" in text
    assert len(text) < 600
    return text


@pytest.mark.parametrize("form", ["update", "jit", "step"])
@pytest.mark.parametrize("kind", FOREIGN)
def test_a_state_of_another_kind_is_refused(kind, form):
    text = attempt(adafactor(**OPTIONS), form, FOREIGN[kind]())
    assert text.startswith("state must be an AdafactorState")
    assert "update(grads, state, params)" in text


@pytest.mark.parametrize("form", ["update", "jit", "step"])
@pytest.mark.parametrize("kind", UNFIT)
def test_a_state_that_does_not_fit_is_refused(kind, form):
    attempt(adafactor(**OPTIONS), form, UNFIT[kind]())


@pytest.mark.parametrize("options", [{"momentum": 0.5}, {"diagnostics": True}, {"factored": False}], ids=str)
def test_a_state_that_lacks_what_is_asked_is_refused(options):
    attempt(adafactor(**OPTIONS | options), "update", made())


def test_momentum_of_other_shapes_is_refused():
    state = made(momentum=0.5)
    state = state._replace(momentum=state.momentum | {"w": jnp.zeros(6)})
    assert "parameter 'w'" in attempt(adafactor(**OPTIONS, momentum=0.5), "update", state)


def test_swapped_arguments_are_named():
    tx, state = adafactor(**OPTIONS), made()
    for arguments in ((PARAMS, PARAMS, state), (state, PARAMS, PARAMS)):
        with pytest.raises(TypeError, match=r"state must be an AdafactorState.*The order is update"):
            tx.update(*arguments)
    with pytest.raises(TypeError, match="The order is update"):
        tx.step(PARAMS, state, PARAMS)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "numpy"])
def test_a_state_cast_to_another_dtype_steps_in_float32(dtype):
    tx, state = adafactor(**OPTIONS, momentum=0.5), made(momentum=0.5)
    _, state = tx.update(PARAMS, state, PARAMS)
    cast = np.asarray if dtype == "numpy" else lambda a: a if a.dtype == jnp.int32 else a.astype(dtype)
    updates, new = tx.update(PARAMS, jax.tree.map(cast, state), PARAMS)
    expected, _ = tx.update(PARAMS, state, PARAMS)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(new[1:])} == {"float32"}
    for a, b in zip(jax.tree.leaves(updates), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-2)


def test_a_state_is_an_adafactor_state_after_everything_jax_does_to_it():
    tx, state = adafactor(**OPTIONS), made()
    for again in (jax.tree.map(lambda a: a + 0, state), jax.jit(lambda s: s)(state), AdafactorState(*state)):
        tx.update(PARAMS, again, PARAMS)
    jax.vmap(lambda s: tx.update(PARAMS, s, PARAMS))(stacked(state))
    jax.eval_shape(tx.update, PARAMS, jax.eval_shape(tx.init, PARAMS), PARAMS)
