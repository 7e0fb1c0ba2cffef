"""Step time of the Keras optimizers on one backend: KERAS_BACKEND=jax python benchmarks/keras_step.py

Ratios are to ours, in the same run: 2.0 means that ours is twice as fast.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np

import adafactor.keras
from shapes import MIXES, Shapes, parameters
from timing import HEADER, interleave

OPTIMIZERS: dict[str, Callable[[], Any]] = {
    "adafactor.keras.Adafactor": lambda: adafactor.keras.Adafactor(1e-3),
    "keras.optimizers.Adafactor": lambda: keras.optimizers.Adafactor(1e-3),
    "keras.optimizers.Adam": lambda: keras.optimizers.Adam(1e-3),
}


def step_of(optimizer: Any, shapes: Shapes) -> Callable[[], object]:
    """One update of fresh variables of these shapes, compiled the way Keras compiles a training step."""
    rng = np.random.default_rng(0)
    variables = [keras.Variable(0.02 * rng.standard_normal(shape, np.float32)) for shape in shapes]
    gradients = [keras.ops.convert_to_tensor(rng.standard_normal(shape, np.float32)) for shape in shapes]
    optimizer.build(variables)
    backend = keras.backend.backend()
    if backend == "jax":
        import jax

        apply = jax.jit(optimizer.stateless_apply, donate_argnums=(0, 2))
        state = [[v.value for v in optimizer.variables], [v.value for v in variables]]

        def step() -> object:
            state[1], state[0] = apply(state[0], gradients, state[1])
            return jax.block_until_ready(state)

    elif backend == "tensorflow":
        import tensorflow as tf

        compiled = tf.function(lambda: optimizer.apply(gradients, variables), jit_compile=True)

        def step() -> object:
            compiled()
            return [float(tf.reduce_sum(v.value[..., :1])) for v in variables[-1:]]

    else:
        import torch

        def step() -> object:
            with torch.no_grad():
                optimizer.apply(gradients, variables)
            return None

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--json", type=Path, help="write the rows to this file as well")
    arguments = parser.parse_args()
    backend = keras.backend.backend()
    results: list[dict[str, Any]] = []
    for mix, shapes in MIXES.items():
        count = parameters(shapes)
        print(f"\nKeras on {backend}, {mix}, float32, {count / 1e6:.1f} M parameters\n{HEADER}")
        steps = {name: step_of(make(), shapes) for name, make in OPTIMIZERS.items()}
        for row in interleave(steps, count, arguments.repeats):
            print(row, flush=True)
            results.append({"backend": backend, "mix": mix, **vars(row)})
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
