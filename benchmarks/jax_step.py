"""Step time of optax transformations, jitted and donated: python benchmarks/jax_step.py

Ratios are to `optax.adamw`, in the same run: 0.5 means that a step takes half as long as AdamW's. Every row is the
whole step, parameters moved. The floor reads g twice and x once and writes x: no optimizer that knows its gradient's
norm does less. Memory is XLA's own account: bytes accessed per parameter as its cost model has it (it does not look
into custom calls), and temporaries in bytes per parameter.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from adafactor.kernels import xla_native
from adafactor.optax import adafactor
from shapes import MIXES, Shapes, parameters
from timing import HEADER, interleave

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
PEERS = {
    "optax.adamw": optax.adamw(1e-3),
    "optax.adafactor": optax.adafactor(1e-3),
    "optax.sgd": optax.sgd(1e-3),
}
STEPS: dict[str, tuple[Callable[..., Any], Callable[[Tree], Tree]]] = {
    **{name: (of(tx), tx.init) for name, tx in PEERS.items()},
    "adafactor.optax, update": (of(OURS), OURS.init),
    "adafactor.optax, step": (lambda params, state, grads: OURS.step(params, grads, state), OURS.init),
    "floor: p + g, sum(g)": (floor, lambda params: jnp.zeros([])),
}


def start(shapes: Shapes) -> tuple[list[jax.Array], list[jax.Array]]:
    rng = np.random.default_rng(0)
    draw = lambda scale: [jnp.asarray(scale * rng.standard_normal(shape, np.float32)) for shape in shapes]  # noqa: E731
    return draw(0.02), draw(1.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--json", type=Path, help="write the rows to this file as well")
    arguments = parser.parse_args()
    print(f"native kernels inside jit: {xla_native.why_not() or 'yes'}")
    results: list[dict[str, Any]] = []
    for mix, shapes in MIXES.items():
        count = parameters(shapes)
        print(f"\nJAX {jax.__version__}, {mix}, float32, {count / 1e6:.1f} M parameters")
        print(f"{HEADER} {'accessed':>9} {'temporary':>9}")
        steps: dict[str, Callable[[], object]] = {}
        memory: dict[str, tuple[float, float]] = {}
        for name, (function, init) in STEPS.items():
            params, grads = start(shapes)
            held = [params, init(params)]
            compiled = jax.jit(function, donate_argnums=(0, 1)).lower(*held, grads).compile()
            accessed = compiled.cost_analysis().get("bytes accessed", float("nan")) / count
            memory[name] = (accessed, compiled.memory_analysis().temp_size_in_bytes / count)

            def step(compiled: Any = compiled, held: list[Any] = held, grads: Any = grads) -> object:
                held[:] = compiled(*held, grads)
                return jax.block_until_ready(held)

            steps[name] = step
        for row in interleave(steps, count, arguments.repeats):
            accessed, temporary = memory[row.name]
            print(f"{row} {accessed:9.1f} {temporary:9.2f}", flush=True)
            results.append({"mix": mix, **vars(row), "accessed": accessed, "temporary": temporary})
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
