"""The plan's bytes are those of the states that optax transformations make: traced, so that a 7B model takes none."""

import jax
import jax.numpy as jnp
import optax
import pytest
from architectures import PUBLIC

from adafactor import plan
from adafactor.optax import adafactor
from adafactor.planning import optimizers as rules

MODELS = [pytest.param(shapes, id=name) for name, (shapes, _) in PUBLIC.items()]


def state_bytes(optimizer, shapes, dtype):
    params = {name: jax.ShapeDtypeStruct(shape, dtype) for name, shape in shapes.items()}
    leaves = jax.tree.leaves(jax.eval_shape(optimizer.init, params))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)


def planned(shapes, rule, dtype):
    (usage,) = plan(shapes, optimizers=[rule], dtype=dtype).usages
    return usage.state


@pytest.mark.parametrize("shapes", MODELS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_adamw(shapes, dtype):
    assert planned(shapes, rules.OptaxAdamW(), dtype) == state_bytes(optax.adamw(1e-3), shapes, jnp.dtype(dtype))


@pytest.mark.parametrize("shapes", MODELS)
@pytest.mark.parametrize(
    ("policy", "least", "momentum", "dtype"),
    [
        ("largest_two", 128, None, "bfloat16"),
        ("last_two", 1, None, "float32"),
        ("smallest", 1, "bfloat16", "float32"),
        ("largest_two", 128, "float32", "bfloat16"),
    ],
)
def test_ours(shapes, policy, least, momentum, dtype):
    options = {} if momentum is None else {"momentum": 0.9, "dtype_momentum": momentum}
    optimizer = adafactor(1e-3, factoring=policy, min_dim_size_to_factor=least, **options)
    rule = rules.Adafactor(framework="jax", factoring=policy, min_dim_size_to_factor=least, momentum=momentum)
    assert planned(shapes, rule, dtype) == state_bytes(optimizer, shapes, jnp.dtype(dtype))


def test_arrays_are_planned_as_they_are():
    params = {"kernel": jnp.ones((4, 3), jnp.bfloat16), "bias": jnp.ones(3)}
    found = plan(params, framework="jax")
    assert [(p.name, p.shape, p.dtype) for p in found.parameters] == [
        ("kernel", (4, 3), "bfloat16"),
        ("bias", (3,), "float32"),
    ]
