"""A small GPT-2 that is fine-tuned in float32 and, three ways, in pure bfloat16: python examples/bf16_gpt2.py

One float32 model learns the sources of Python's standard library, byte by byte. Then four copies go on at a low
learning rate, with the same batches: float32; bfloat16 compensated, with stochastic rounding, and rounded to nearest.
Prints held-out losses and draws docs/images/bf16-curves.png. Needs transformers and matplotlib.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from pathlib import Path
from typing import Any

import torch
from demo import text as corpus
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from adafactor.torch import Adafactor, step_in_backward

CONTEXT, BATCH, WINDOWS = 96, 12, 64
FIXED = {"relative_step": False, "scale_parameter": False}
WAYS: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    "float32": (torch.float32, {}),
    "bfloat16, compensated": (torch.bfloat16, {"compensated": True}),
    "bfloat16, stochastic rounding": (torch.bfloat16, {"stochastic_rounding": True}),
    "bfloat16, rounded to nearest": (torch.bfloat16, {}),
}
PICTURE = Path(__file__).parents[1] / "docs" / "images" / "bf16-curves.png"


def new_model() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"vocab_size": 256, "n_positions": CONTEXT, "n_embd": 128, "n_layer": 4, "n_head": 4}
    tokens = {"bos_token_id": 0, "eos_token_id": 0}
    return GPT2LMHeadModel(GPT2Config(**sizes, **tokens, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0))


def loss_of(model: nn.Module, batch: tuple[Any, Any]) -> torch.Tensor:
    tokens, following = (torch.from_numpy(part).long() for part in batch)
    logits = model(tokens).logits.float()
    return nn.functional.cross_entropy(logits.flatten(0, 1), following.flatten())


def train(
    model: nn.Module, optimizer: Adafactor, text: corpus.Text, steps: range, every: int, rates: list[float]
) -> list[tuple[int, float]]:
    """Held-out losses, in nats per byte, before the first step and after every ``every``."""
    held_out = corpus.validation_set(text, WINDOWS, CONTEXT)

    def evaluate() -> float:
        with torch.no_grad():
            return float(loss_of(model, held_out))

    curve = [(0, evaluate())]
    with step_in_backward(model, optimizer):
        for count, (step, rate) in enumerate(zip(steps, rates, strict=True), 1):
            optimizer.param_groups[0]["lr"] = rate
            loss_of(model, corpus.training_batch(text, 0, step, BATCH, CONTEXT)).backward()
            if count % every == 0:
                curve.append((count, evaluate()))
    return curve


def draw(curves: dict[str, list[tuple[int, float]]], rate: float, path: Path) -> None:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    looks = (("k-", 6, 0.25), ("C0-", 2, 1), ("C1:", 3, 1), ("C3-", 2, 1))  # the first three nearly coincide
    for (name, curve), (style, width, alpha) in zip(curves.items(), looks, strict=True):
        axes.plot(*zip(*curve, strict=True), style, linewidth=width, alpha=alpha, label=f"{name}: {curve[-1][1]:.4f}")
    axes.set_xlabel(f"step at learning rate {rate:g}")
    axes.set_ylabel("held-out loss, nats per byte")
    axes.set_title("A small GPT-2 that goes on from the same float32 weights")
    axes.grid(alpha=0.3)
    axes.legend(title="final loss")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--start", type=int, default=500, help="steps of the common float32 start")
    parser.add_argument("--steps", type=int, default=400, help="steps of each way")
    parser.add_argument("--every", type=int, default=25, help="steps between two evaluations")
    parser.add_argument("--lr", type=float, default=1e-5, help="learning rate of the four ways")
    parser.add_argument("--picture", type=Path, default=PICTURE)
    parser.add_argument("--json", type=Path, help="write the curves to this file as well")
    arguments = parser.parse_args()

    began = time.monotonic()
    text = corpus.read(None, corpus.least(CONTEXT))
    print(text.describe())
    model = new_model()
    parameters = sum(p.numel() for p in model.parameters())
    print(f"GPT-2 with {parameters:,} parameters; the start, {arguments.start} steps in float32")
    rates = [3e-3 * min(1.0, (step + 1) / 50) for step in range(arguments.start)]
    optimizer = Adafactor(model.parameters(), **FIXED)
    curve = train(model, optimizer, text, range(arguments.start), arguments.start, rates)
    print(f"held-out loss {curve[0][1]:.4f} -> {curve[-1][1]:.4f}, {time.monotonic() - began:.0f} s", flush=True)

    curves = {}
    for name, (dtype, options) in WAYS.items():
        copied = copy.deepcopy(model).to(dtype)
        ours = Adafactor(copied.parameters(), **FIXED, **options)
        steps = range(arguments.start, arguments.start + arguments.steps)
        before = [p.detach().clone() for p in copied.parameters()]
        curves[name] = train(copied, ours, text, steps, arguments.every, [arguments.lr] * arguments.steps)
        still = sum(int((p == b).sum()) for p, b in zip(copied.parameters(), before, strict=True)) / parameters
        first, last = curves[name][0][1], curves[name][-1][1]
        seconds = time.monotonic() - began
        print(f"{name:<30} {first:.4f} -> {last:.4f}, {still:.0%} of the weights unmoved, {seconds:.0f} s", flush=True)
    draw(curves, arguments.lr, arguments.picture)
    print(f"wrote {arguments.picture}")
    if arguments.json:
        arguments.json.write_text(json.dumps(curves, indent=1))


if __name__ == "__main__":
    main()
