"""Step time of the Keras optimizers on the backend that ``KERAS_BACKEND`` names, compiled as Keras compiles a step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import keras
import numpy as np

import adafactor.keras
from adafactor.cli.bench.shapes import MIXES, Shapes, parameters
from adafactor.cli.bench.timing import Budget, Case, interleave

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


def measure(repeats: int, budget: Budget) -> Iterator[Case]:
    """Time every mix of shapes; ratios are to ours."""
    backend = keras.backend.backend()
    for mix, shapes in MIXES.items():
        end = budget.next()
        if end is None:
            return
        count = parameters(shapes)
        steps = {name: step_of(make(), shapes) for name, make in OPTIMIZERS.items()}
        rows = interleave(steps, count, repeats, end=end)
        title = f"Keras {keras.__version__} on {backend}, {mix}, float32, {count / 1e6:.1f} M parameters"
        yield Case(title, [{"backend": backend, "mix": mix, **vars(row)} for row in rows])


def quick(repeats: int, budget: Budget) -> Iterator[Case]:
    """What ``adafactor bench`` runs."""
    return measure(repeats, budget)


COUNT = len(MIXES)
