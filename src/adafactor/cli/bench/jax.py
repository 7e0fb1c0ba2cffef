"""Step time of optax transformations, jitted and donated.

Every row is the whole step, parameters moved. The floor reads g twice and x once and writes x: no optimizer that knows
its gradient's norm does less. Memory is XLA's own account: bytes accessed per parameter as its cost model has it (it
does not look into custom calls), and temporaries in bytes per parameter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from adafactor.cli.bench.shapes import MIXES, Shapes, parameters
from adafactor.cli.bench.timing import Budget, Case, interleave
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


def start(shapes: Shapes) -> tuple[list[jax.Array], list[jax.Array]]:
    rng = np.random.default_rng(0)
    draw = lambda scale: [jnp.asarray(scale * rng.standard_normal(shape, np.float32)) for shape in shapes]  # noqa: E731
    return draw(0.02), draw(1.0)


def measure(repeats: int, baseline: str, budget: Budget) -> Iterator[Case]:
    """Time every mix of shapes; ratios are to ``baseline``, a name in ``STEPS``."""
    for mix, shapes in MIXES.items():
        end = budget.next()
        if end is None:
            return
        count = parameters(shapes)
        steps: dict[str, Callable[[], object]] = {}
        memory: dict[str, dict[str, float]] = {}
        for name, (function, init) in STEPS.items():
            params, grads = start(shapes)
            held = [params, init(params)]
            compiled = jax.jit(function, donate_argnums=(0, 1)).lower(*held, grads).compile()
            costs: Any = compiled.cost_analysis() or {}
            sizes: Any = compiled.memory_analysis()
            accessed = costs.get("bytes accessed", float("nan")) / count
            memory[name] = {"accessed": accessed, "temporary": sizes.temp_size_in_bytes / count}

            def step(compiled: Any = compiled, held: list[Any] = held, grads: Any = grads) -> object:
                held[:] = compiled(*held, grads)
                return jax.block_until_ready(held)

            steps[name] = step
        rows = interleave(steps, count, repeats, baseline, end)
        title = f"JAX {jax.__version__}, {mix}, float32, {count / 1e6:.1f} M parameters"
        yield Case(title, [{"mix": mix, **vars(row), **memory[row.name]} for row in rows])


def quick(repeats: int, budget: Budget) -> Iterator[Case]:
    """What ``adafactor bench`` runs."""
    return measure(repeats, FASTEST, budget)


COUNT = len(MIXES)
