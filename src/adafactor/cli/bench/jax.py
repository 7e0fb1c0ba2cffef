"""Step time of optax transformations, jitted and donated.

Every row is the whole step, parameters moved. The floor reads g twice and x once and writes x: no optimizer that knows
its gradient's norm does less. ``accessed`` and ``temporary`` are XLA's own account, in bytes per parameter: accesses as
its cost model has them (it does not look into custom calls), and temporaries.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from adafactor.cli.bench.shapes import MIXES, Shapes, parameters
from adafactor.cli.bench.timing import Candidate, Group, Problem, over
from adafactor.optax import adafactor

Tree = Any


def of(tx: optax.GradientTransformation) -> Callable[[Tree, Tree, Tree], tuple[Tree, Tree]]:
    """The step as optax users write it."""

    def step(params: Tree, state: Tree, grads: Tree) -> tuple[Tree, Tree]:
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return step


def floor(params: Tree, state: Tree, grads: Tree) -> tuple[Tree, Tree]:
    return jax.tree.map(jnp.add, params, grads), sum(jnp.sum(g) for g in grads)


OURS = adafactor(1e-3)
FASTEST = "adafactor.optax, step"
PEERS = {
    "optax.adamw": optax.adamw(1e-3),
    "optax.adafactor": optax.adafactor(1e-3),
    "optax.sgd": optax.sgd(1e-3),
}
STEPS: dict[str, tuple[Callable[..., Any], Callable[[Tree], Tree]]] = {
    **{name: (of(tx), tx.init) for name, tx in PEERS.items()},
    "adafactor.optax, update": (of(OURS), OURS.init),
    FASTEST: (lambda params, state, grads: OURS.step(params, grads, state), OURS.init),
    "floor: p + g, sum(g)": (floor, lambda params: jnp.zeros([])),
}


def candidate(name: str, shapes: Shapes) -> Candidate:
    function, init = STEPS[name]
    rng = np.random.default_rng(0)
    params, grads = (
        [jnp.asarray(scale * rng.standard_normal(shape, np.float32)) for shape in shapes] for scale in (0.02, 1.0)
    )
    held = [params, init(params)]
    compiled = jax.jit(function, donate_argnums=(0, 1)).lower(*held, grads).compile()
    costs: Any = compiled.cost_analysis() or {}
    sizes: Any = compiled.memory_analysis()
    memory = {"accessed": costs.get("bytes accessed", float("nan")), "temporary": sizes.temp_size_in_bytes}

    def step() -> object:
        held[:] = compiled(*held, grads)
        return jax.block_until_ready(held)

    return Candidate(step, {figure: size / parameters(shapes) for figure, size in memory.items()})


def problem(mix: str, shapes: Shapes) -> Problem:
    """Ratios are to our fastest."""
    names = [FASTEST, *(name for name in STEPS if name != FASTEST)]
    group = Group(lambda: {name: candidate(name, shapes) for name in names})
    return over(f"JAX {jax.__version__}", {"mix": mix}, shapes, [group])


def problems(full: bool) -> list[Problem]:
    return [problem(*mix) for mix in MIXES.items()]
