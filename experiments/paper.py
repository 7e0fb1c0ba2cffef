"""The stability findings of the Adafactor paper, small: python experiments/paper.py

A small Transformer learns the bytes of the Python standard library's sources under the settings that section 5 to 7 of
Shazeer and Stern (2018) compare, each with and without warm-up: momentum or none, full or factored second moment, slow,
fast and increasing decay, update clipping at 1 and 2, absolute and relative step size. It prints the held-out losses
and the largest RMS of an update, and draws loss and RMS(u) over the steps.

As in the paper a relative step size is ten times the absolute one. There they stay constant for 10,000 steps without
warm-up and rise through them with it; this run is short, and rises through its first fifth.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from adafactor.optax import adafactor

sys.path.append(str(Path(__file__).parents[1] / "examples"))
from demo import text

WIDTH, LAYERS, HEADS, CONTEXT, BATCH = 128, 3, 4, 64, 16
Tree = Any


class Setting(NamedTuple):
    """A row of the comparison: what it is called, and what it changes of ``adafactor``'s arguments."""

    name: str
    options: dict[str, Any]


SLOW = {"decay_rate": 1.0, "decay_rate_max": 0.999}  # min(0.999, 1 - 1/t): Adam's decay with its bias correction
FAST = {"decay_rate": 1.0, "decay_rate_max": 0.9}
SETTINGS = (
    Setting("full, momentum 0.9, decay 0.999", {**SLOW, "factored": False, "momentum": 0.9}),
    Setting("factored, momentum 0.9, decay 0.999", {**SLOW, "momentum": 0.9}),
    Setting("full, decay 0.999", {**SLOW, "factored": False}),
    Setting("factored, decay 0.999", SLOW),
    Setting("factored, decay 0.9", FAST),
    Setting("factored, decay 0.999, clip 2", {**SLOW, "clipping_threshold": 2.0}),
    Setting("factored, decay 0.999, clip 1", {**SLOW, "clipping_threshold": 1.0}),
    Setting("factored, decay 1 - t^-0.5", {"decay_rate": 0.5}),
    Setting("factored, decay 1 - t^-0.8", {"decay_rate": 0.8}),
    Setting("factored, decay 1 - t^-0.8, clip 1", {"decay_rate": 0.8, "clipping_threshold": 1.0}),
    Setting(
        "the same, relative step size",
        {"decay_rate": 0.8, "clipping_threshold": 1.0, "multiply_by_parameter_scale": True},
    ),
)


# -- the model: a decoder with pre-norm residuals, as Tensor2Tensor had them -------------------------------------------


def initial(key: jax.Array) -> Tree:
    keys = iter(jax.random.split(key, 2 + 6 * LAYERS))

    def matrix(n: int, m: int) -> jax.Array:
        return jax.random.normal(next(keys), (n, m)) / math.sqrt(n)

    def layer() -> Tree:
        return {
            "qkv": matrix(WIDTH, 3 * WIDTH),
            "out": matrix(WIDTH, WIDTH),
            "up": matrix(WIDTH, 4 * WIDTH),
            "down": matrix(4 * WIDTH, WIDTH),
            "scales": jnp.ones((2, WIDTH)),
        }

    return {
        "embedding": jax.random.normal(next(keys), (256, WIDTH)) / math.sqrt(WIDTH),  # also the softmax
        "positions": jax.random.normal(next(keys), (CONTEXT, WIDTH)) / math.sqrt(WIDTH),
        "scale": jnp.ones(WIDTH),
        "layers": [layer() for _ in range(LAYERS)],
    }


def norm(x: jax.Array, scale: jax.Array) -> jax.Array:
    x = x - x.mean(-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + 1e-6) * scale


def logits(params: Tree, tokens: jax.Array) -> jax.Array:
    x = (params["embedding"][tokens] + params["positions"]) * math.sqrt(WIDTH)
    mask = jnp.tril(jnp.ones((CONTEXT, CONTEXT), bool))
    for layer in params["layers"]:
        h = norm(x, layer["scales"][0])
        q, k, v = jnp.split((h @ layer["qkv"]).reshape(*x.shape[:2], 3 * HEADS, -1), 3, axis=2)
        weights = jnp.einsum("bihd,bjhd->bhij", q, k) / math.sqrt(WIDTH // HEADS)
        weights = jax.nn.softmax(jnp.where(mask, weights, -1e9))
        x = x + jnp.einsum("bhij,bjhd->bihd", weights, v).reshape(x.shape) @ layer["out"]
        h = norm(x, layer["scales"][1])
        x = x + jax.nn.relu(h @ layer["up"]) @ layer["down"]
    return norm(x, params["scale"]) @ params["embedding"].T


def loss_of(params: Tree, window: jax.Array) -> jax.Array:
    chosen = jnp.take_along_axis(jax.nn.log_softmax(logits(params, window[:, :-1])), window[:, 1:, None], axis=-1)
    return -chosen.mean()


# -- a run -------------------------------------------------------------------------------------------------------------


def windows(data: np.ndarray, count: int, seed: int) -> jax.Array:
    """``count`` batches of windows of one byte more than the context."""
    starts = np.random.default_rng(seed).integers(0, len(data) - CONTEXT - 1, (count, BATCH, 1))
    return jnp.asarray(data[starts + np.arange(CONTEXT + 1)], jnp.int32)


def run(setting: Setting, warm_up: bool, step_size: float, batches: jax.Array, held_out: jax.Array) -> dict[str, Any]:
    steps = len(batches)
    options: dict[str, Any] = {"clipping_threshold": None, "multiply_by_parameter_scale": False, **setting.options}
    rate = step_size * (10 if options["multiply_by_parameter_scale"] else 1)
    ramp = optax.linear_schedule(rate / (steps // 5), rate, steps // 5) if warm_up else rate
    optimizer = adafactor(ramp, min_dim_size_to_factor=16, diagnostics=True, **options)

    def step(carry: tuple[Tree, Tree], window: jax.Array) -> tuple[tuple[Tree, Tree], tuple[jax.Array, ...]]:
        params, state = carry
        loss, grads = jax.value_and_grad(loss_of)(params, window)
        updates, state = optimizer.update(grads, state, params)
        rms = state.diagnostics.update_rms
        largest = jnp.stack(jax.tree.leaves(rms)).max()
        return (optax.apply_updates(params, updates), state), (loss, rms["layers"][0]["qkv"], largest)

    params = initial(jax.random.key(0))
    train = jax.jit(lambda carry: jax.lax.scan(step, carry, batches))
    (params, _), traces = train((params, optimizer.init(params)))
    final = jax.jit(lambda params: jax.lax.map(lambda window: loss_of(params, window), held_out).mean())(params)
    names = ("losses", "update_rms", "largest_update_rms")
    values = {name: np.asarray(trace).tolist() for name, trace in zip(names, traces, strict=True)}
    return {"name": setting.name, "warm_up": warm_up, "held_out": float(final), **values}


# -- what it says ------------------------------------------------------------------------------------------------------


def table(runs: list[dict[str, Any]]) -> str:
    """Markdown: per setting the held-out loss and the largest RMS(u) after the first step, with and without warm-up."""
    lines = ["| | with warm-up | without | largest RMS(u) with | without |", "|---|---|---|---|---|"]
    for setting in SETTINGS:
        both = [next(r for r in runs if r["name"] == setting.name and r["warm_up"] == warm) for warm in (True, False)]
        losses = [f"{r['held_out']:.3f}" if math.isfinite(r["held_out"]) else "diverged" for r in both]
        rms = [f"{np.nanmax(r['largest_update_rms'][1:]):.1f}" for r in both]
        lines.append(f"| {setting.name} | {' | '.join(losses + rms)} |")
    return "\n".join(lines)


def draw(runs: list[dict[str, Any]], path: Path) -> None:
    """Loss and RMS(u) of one kernel over the steps, smoothed, without warm-up above and with it below."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shown = {
        "full, momentum 0.9, decay 0.999": "#8c8c8c",
        "factored, decay 0.999": "#d55e00",
        "factored, decay 0.999, clip 1": "#0072b2",
        "factored, decay 1 - t^-0.8, clip 1": "#009e73",
        "the same, relative step size": "#000000",
    }
    figure, axes = plt.subplots(2, 2, figsize=(11, 7.5), sharex=True, sharey="col", layout="constrained")
    for row, warm_up in zip(axes, (False, True), strict=True):
        for one in (r for name in shown for r in runs if r["name"] == name and r["warm_up"] == warm_up):
            width = max(1, len(one["losses"]) // 25)
            for axis, values in zip(row, (one["losses"], one["update_rms"]), strict=True):
                smooth = np.convolve(values, np.ones(width) / width, "valid")
                label = one["name"].replace("the same", "decay 1 - t^-0.8, clip 1")
                axis.plot(np.arange(len(smooth)) + width, smooth, color=shown[one["name"]], lw=1.3, label=label)
        row[0].set(title=f"{'With' if warm_up else 'Without'} warm-up", ylabel="training loss, nats per byte")
        row[1].set(title="RMS(u) before clipping, first attention kernel")
        row[1].axhline(1, color="#bbbbbb", lw=0.8, zorder=0)
    for axis in axes[1]:
        axis.set_xlabel(f"step (means of {width})")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--step-size", type=float, default=1e-2, help="alpha; the relative step takes ten times it")
    parser.add_argument("--text", help="a file or folder to learn instead of the standard library")
    parser.add_argument("--plot", type=Path, default=Path("build/paper.png"))
    parser.add_argument("--json", type=Path, help="write every loss and RMS(u) to this file")
    arguments = parser.parse_args()
    read = text.read(arguments.text, text.least(CONTEXT))
    print(read.describe(), flush=True)
    batches = windows(read.training, arguments.steps, seed=0)
    held_out = windows(read.validation, 50, seed=1)
    runs = []
    for setting in SETTINGS:
        for warm_up in (True, False):
            begun = time.perf_counter()
            one = run(setting, warm_up, arguments.step_size, batches, held_out)
            runs.append(one)
            label = f"{setting.name}, {'with' if warm_up else 'without'} warm-up"
            print(f"{label:<62} {one['held_out']:8.3f}  {time.perf_counter() - begun:5.0f} s", flush=True)
    print("\n" + table(runs))
    arguments.plot.parent.mkdir(parents=True, exist_ok=True)
    draw(runs, arguments.plot)
    print(f"\n{arguments.plot}")
    if arguments.json:
        arguments.json.write_text(json.dumps(runs))


if __name__ == "__main__":
    main()
