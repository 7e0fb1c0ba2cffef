"""Ten thousand steps need no more memory than the first thousand."""

import gc

import keras
import numpy as np
import psutil
import pytest
import torch
from native_support import need

import adafactor.keras
import adafactor.torch
from adafactor.kernels import native

FIRST, STEPS = 1_000, 10_000
SHAPES = [(4, 6), (5,), (), (2, 3, 4)]
# Measured: at most 0.1 MiB and no object. Eighty bytes kept by every step are 0.7 MiB.
BYTES, OBJECTS = 3 << 18, 100


def grows(step, times):
    """Bytes and Python objects that came on top after the first thousand steps."""
    for number in range(FIRST):
        step(number)
    gc.collect()
    memory, objects = psutil.Process().memory_info().rss, len(gc.get_objects())
    for number in range(FIRST, STEPS * times):
        step(number)
    gc.collect()
    return psutil.Process().memory_info().rss - memory, len(gc.get_objects()) - objects


def with_torch(fused, changing):
    params = [torch.nn.Parameter(torch.ones(shape)) for shape in SHAPES]
    gradients = [torch.full(shape, 0.5) for shape in SHAPES]
    optimizer = adafactor.torch.Adafactor(params, fused=fused)

    def step(number):
        if changing == "learning rate":
            optimizer.param_groups[0]["lr"] = 1e-2 / (1 + number)
        # sixteen sets, more than are kept
        chosen = number % 16 if changing == "parameters" else 15
        for k, (param, g) in enumerate(zip(params, gradients, strict=True)):
            param.grad = g.clone() if chosen >> k & 1 else None
        optimizer.step()

    return step


def with_keras():
    variables = [keras.Variable(np.ones(shape, np.float32)) for shape in SHAPES]
    optimizer = adafactor.keras.Adafactor(keras.optimizers.schedules.CosineDecay(0.1, STEPS))
    gradients = [keras.ops.full(shape, 0.5) for shape in SHAPES]
    optimizer.build(variables)
    return lambda number: optimizer.apply(gradients, variables)


def with_optax():
    import jax
    import jax.numpy as jnp

    from adafactor.optax import adafactor as transformation

    optimizer = transformation(lambda count: 1e-2 / (1 + count), 1)
    update = jax.jit(optimizer.step, donate_argnums=(0, 2))
    grads = [jnp.full(shape, 0.5) for shape in SHAPES]
    params = [jnp.ones(shape) for shape in SHAPES]
    held = [params, optimizer.init(params)]

    def step(number):
        held[:] = update(held[0], grads, held[1])

    return step


MAKERS = {
    "torch, native, learning rate": lambda: with_torch(True, "learning rate"),
    "torch, native, parameters": lambda: with_torch(True, "parameters"),
    "torch operations, learning rate": lambda: with_torch(False, "learning rate"),
    "keras": with_keras,
    "optax": with_optax,
}


@pytest.mark.parametrize("maker", MAKERS.values(), ids=MAKERS)
def test_memory_does_not_grow(maker, times):
    if maker in (MAKERS["torch, native, learning rate"], MAKERS["torch, native, parameters"]):
        need(native.why_not())
    more, objects = grows(maker(), times)
    assert more < BYTES * times
    assert objects < OBJECTS
