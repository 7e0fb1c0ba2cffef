"""A stack of MLP blocks sharded over 8 devices, its optimizer state with it: python examples/jax_sharded.py

Without 8 accelerators it runs on 8 virtual CPU devices.
"""

import os
import re

os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from adafactor.optax import adafactor

LAYERS, WIDTH, HIDDEN, BATCH = 6, 64, 256, 32
mesh = jax.make_mesh((8,), ("model",), axis_types=(AxisType.Auto,))

# Up-projections keep their columns apart, down-projections their rows: the activations meet once per block.
specs = {"up": P(None, None, "model"), "down": P(None, "model"), "norm": P()}
shapes = {"up": (LAYERS, WIDTH, HIDDEN), "down": (LAYERS, HIDDEN, WIDTH), "norm": (LAYERS, WIDTH)}
shardings = {name: NamedSharding(mesh, spec) for name, spec in specs.items()}

keys = jax.random.split(jax.random.key(0), len(shapes))
params = {name: 0.05 * jax.random.normal(key, shape) for key, (name, shape) in zip(keys, shapes.items(), strict=True)}
params = jax.device_put(params, shardings)

# Axis 0 holds the layers: every layer is clipped and scaled by itself.
optimizer = adafactor(1e-2, min_dim_size_to_factor=8, relative_step=True, batch_axes=(0,), shardings=shardings)
state = optimizer.init(params)


def loss(params, x, y):
    def block(x, layer):
        h = x * (1 + layer["norm"])
        return x + jax.nn.gelu(h @ layer["up"]) @ layer["down"], None

    return jnp.mean((jax.lax.scan(block, x, params)[0] - y) ** 2)


def train(params, state, x, y):
    value, grads = jax.value_and_grad(loss)(params, x, y)
    return *optimizer.step(params, grads, state), value


step = jax.jit(train, donate_argnums=(0, 1))
x = jax.random.normal(jax.random.key(1), (BATCH, WIDTH))
y = jnp.sin(3 * x) @ jax.random.normal(jax.random.key(2), (WIDTH, WIDTH)) / WIDTH**0.5

for name, row, column in ((name, state.row[name], state.column[name]) for name in ("up", "down")):
    print(f"{name:5} {specs[name]!s:28} row {row.sharding.spec!s:18} column {column.sharding.spec}")
alone = jax.jit(optimizer.step).lower(params, params, state).compile().as_text()
print(f"all-reduces of the optimizer: {len(re.findall(r' all-reduce(?:-start)?[(]', alone))}")
for k in range(1, 101):
    params, state, value = step(params, state, x, y)
    if k % 20 == 0:
        print(f"step {k:3}  loss {float(value):.4f}")
print(f"compilations: {step._cache_size()}")
