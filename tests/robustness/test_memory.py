"""Ten thousand steps need no more memory than the first thousand."""

import ctypes
import gc
import sys

import keras
import numpy as np
import psutil
import pytest
import torch
from native_support import need

import adafactor.keras
import adafactor.torch
from adafactor.core import native

# Multiples of the sixteen sets of gradients below: what is kept of them is the same at both ends.
FIRST, STEPS = 1_024, 10_240
SHAPES = [(4, 6), (5,), (), (2, 3, 4)]
# Eight bytes or a tenth of an object kept by every step are too much. What the process takes from the system moves by
# megabytes before it settles, however little is in use.
LIMITS = {"bytes in use": 72_000, "Python's blocks": 900, "objects": 900, "bytes of the process": 16 << 20}


class Mallinfo(ctypes.Structure):
    _fields_ = tuple(
        (name, ctypes.c_size_t)
        for name in (
            "arena",
            "ordblks",
            "smblks",
            "hblks",
            "hblkhd",
            "usmblks",
            "fsmblks",
            "uordblks",
            "fordblks",
            "keep",
        )
    )


def in_use():
    gc.collect()
    counts = {
        "Python's blocks": sys.getallocatedblocks(),
        "objects": len(gc.get_objects()),
        "bytes of the process": psutil.Process().memory_info().rss,
    }
    mallinfo = getattr(ctypes.CDLL(None), "mallinfo2", None)  # glibc's
    if mallinfo is not None:
        mallinfo.restype = Mallinfo
        info = mallinfo()
        counts["bytes in use"] = info.hblkhd + info.uordblks  # mapped blocks and all others
    return counts


def growth(step, times):
    """What came on top after the first thousand steps."""
    for number in range(FIRST):
        step(number)
    before = in_use()
    for number in range(FIRST, STEPS * times):
        step(number)
    after = in_use()
    return {name: after[name] - before[name] for name in after}


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
    found = growth(maker(), times)
    print(found)
    assert all(more <= LIMITS[name] for name, more in found.items()), found
