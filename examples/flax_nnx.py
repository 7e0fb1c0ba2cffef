"""A byte-level model in Flax NNX learns Python from the standard library's own sources: python examples/flax_nnx.py"""

import argparse
import pathlib
import sysconfig
import time

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from adafactor.optax import adafactor

CONTEXT, WIDTH, BATCH = 32, 128, 64


class Model(nnx.Module):
    """Predicts the byte after every window of CONTEXT bytes."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.embedding = nnx.Embed(256, 16, rngs=rngs)
        self.mix = nnx.Linear(16 * CONTEXT, WIDTH, rngs=rngs)
        self.hidden = nnx.Linear(WIDTH, WIDTH, rngs=rngs)
        self.out = nnx.Linear(WIDTH, 256, rngs=rngs)

    def __call__(self, window: jax.Array) -> jax.Array:
        x = self.embedding(window).reshape(*window.shape[:-1], -1)
        x = nnx.gelu(self.mix(x))
        return self.out(x + nnx.gelu(self.hidden(x)))


def text() -> np.ndarray:
    library = pathlib.Path(sysconfig.get_path("stdlib"))
    files = sorted(library.glob("[a-z]*.py"))[:80]
    return np.frombuffer(b"".join(file.read_bytes() for file in files), np.uint8)


@nnx.jit
def train(model: Model, optimizer: nnx.Optimizer, window: jax.Array, following: jax.Array) -> jax.Array:
    def loss(model: Model) -> jax.Array:
        chosen = jnp.take_along_axis(jax.nn.log_softmax(model(window)), following[:, None], axis=-1)
        return -chosen.mean()

    value, grads = nnx.value_and_grad(loss)(model)
    optimizer.update(model, grads)
    return value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=1500)
    steps = parser.parse_args().steps
    data, rng = text(), np.random.default_rng(0)
    model = Model(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, adafactor(1e-2, min_dim_size_to_factor=16, relative_step=True), wrt=nnx.Param)

    weights = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))
    kept = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(optimizer, nnx.OptState)))
    print(f"{len(data):,} bytes of text, {weights:,} weights; Adafactor keeps {kept:,} numbers, Adam {2 * weights:,}")
    start, losses = time.perf_counter(), []
    for step in range(1, steps + 1):
        at = rng.integers(0, len(data) - CONTEXT, BATCH)[:, None] + np.arange(CONTEXT + 1)
        batch = data[np.minimum(at, len(data) - 1)].astype(np.int32)
        losses.append(train(model, optimizer, batch[:, :-1], batch[:, -1]))
        if step % max(steps // 10, 1) == 0:
            recent = float(jnp.stack(losses[-(steps // 10 or 1) :]).mean())
            print(f"step {step:5}  loss {recent:.3f} nats per byte  {time.perf_counter() - start:5.1f} s", flush=True)


if __name__ == "__main__":
    main()
