"""Step time of the Keras optimizers on the backend that ``KERAS_BACKEND`` names, compiled as Keras compiles a step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import numpy as np

import adafactor.keras
from adafactor.cli.bench.shapes import MIXES, Shapes
from adafactor.cli.bench.timing import Candidate, Group, Problem, over

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


def problem(mix: str, shapes: Shapes) -> Problem:
    """Ratios are to ours."""
    backend = keras.backend.backend()
    group = Group(lambda: {name: Candidate(step_of(make(), shapes)) for name, make in OPTIMIZERS.items()})
    return over(f"Keras {keras.__version__} on {backend}", {"backend": backend, "mix": mix}, shapes, [group])


def problems(full: bool) -> list[Problem]:
    return [problem(*mix) for mix in MIXES.items()]
