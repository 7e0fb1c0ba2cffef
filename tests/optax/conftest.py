"""Eight CPU devices for the sharding tests, in every process that runs a test of this directory."""

import os

os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8".strip()

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from native_support import need

from adafactor.engine.xla import custom_call


@pytest.fixture(params=["native", "jnp"])
def path(request, monkeypatch):
    """Both ways of running on CPU."""
    if request.param == "native":
        need(custom_call.why_not())
    if request.param == "jnp":
        monkeypatch.setattr(custom_call, "why_not", lambda: "switched off by a test")
    jax.clear_caches()
    yield request.param
    jax.clear_caches()


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture
def params(rng):
    shapes = {"kernel": (160, 200), "bias": (30,), "stack": (130, 3, 140), "scale": ()}
    return {name: jnp.asarray(rng.standard_normal(shape), jnp.float32) for name, shape in shapes.items()}


@pytest.fixture
def grads(params, rng):
    return [jax.tree.map(lambda p: jnp.asarray(rng.standard_normal(p.shape), p.dtype), params) for _ in range(4)]
