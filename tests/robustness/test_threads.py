"""Two optimizers stepped from two threads at once end with the bits that each ends with alone.

One optimizer is not to be stepped from two threads.
"""

import threading

import keras
import numpy as np
import pytest
import torch
from native_support import need

import adafactor.keras
import adafactor.torch
from adafactor.core import native

SHAPES = [(64, 48), (33,), (), (2, 16, 9), (700, 300)]
STEPS = 60


def values(seed, step):
    rng = np.random.default_rng([seed, step])
    return [np.asarray(rng.normal(size=shape), np.float32) for shape in SHAPES]


def at_once(runs):
    """Every run's result, each in a thread of its own, begun together."""
    barrier, found = threading.Barrier(len(runs)), [None] * len(runs)

    def work(k):
        barrier.wait()
        found[k] = runs[k]()

    threads = [threading.Thread(target=work, args=(k,)) for k in range(len(runs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert all(result is not None for result in found)
    return found


def with_torch(seed, fused):
    def run():
        params = [torch.nn.Parameter(torch.from_numpy(x).bfloat16()) for x in values(seed, 0)]
        options = {"lr": 0.1, "beta1": 0.9, "stochastic_rounding": True, "seed": seed}  # else each draws its own
        optimizer = adafactor.torch.Adafactor(params, **options, fused=fused)
        for step in range(STEPS):
            for param, g in zip(params, values(seed, 1 + step % 5), strict=True):
                param.grad = torch.from_numpy(g).bfloat16()
            optimizer.step()
        held = [*params, *(v for p in params for v in optimizer.state[p].values())]
        return [tensor.detach().double().numpy().tobytes() for tensor in held]

    return run


def with_keras(seed):
    variables = [keras.Variable(x) for x in values(seed, 0)]
    optimizer = adafactor.keras.Adafactor(0.1, beta_1=0.9)
    optimizer.build(variables)

    def run():
        for step in range(STEPS):
            optimizer.apply([keras.ops.convert_to_tensor(g) for g in values(seed, 1 + step % 5)], variables)
        return [np.asarray(keras.ops.convert_to_numpy(v)).tobytes() for v in [*variables, *optimizer.variables]]

    return run


def with_optax(seed, jitted):
    import jax
    import jax.numpy as jnp

    from adafactor.optax import adafactor as transformation

    optimizer = transformation(0.1, 1, momentum=0.9)
    step_of = jax.jit(optimizer.step) if jitted else optimizer.step

    def run():
        params = [jnp.asarray(x) for x in values(seed, 0)]
        state = optimizer.init(params)
        for step in range(STEPS if jitted else 8):
            params, state = step_of(params, [jnp.asarray(g) for g in values(seed, 1 + step % 5)], state)
        return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves((params, state))]

    return run


MAKERS = {
    "torch, native": lambda seed: with_torch(seed, True),
    "torch operations": lambda seed: with_torch(seed, False),
    "keras": with_keras,
    "optax, jitted": lambda seed: with_optax(seed, True),
    "optax": lambda seed: with_optax(seed, False),
}


@pytest.mark.parametrize("maker", MAKERS.values(), ids=MAKERS)
def test_two_threads_end_as_one_does(maker, times):
    if maker is MAKERS["torch, native"]:
        need(native.why_not())
    alone = [maker(seed)() for seed in (1, 2)]
    assert alone[0] != alone[1]
    for _ in range(times):
        assert at_once([maker(seed) for seed in (1, 2)]) == alone
