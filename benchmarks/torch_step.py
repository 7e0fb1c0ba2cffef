"""Step time of the PyTorch optimizers on the CPU: python benchmarks/torch_step.py

Ratios are to ours, in the same run, turn by turn: 2.0 means that ours is twice as fast. The floor reads every
gradient, then reads it again and adds it to its parameter (``g.sum()`` and ``p.add_(g)``): what an exact Adafactor
cannot avoid.
"""

from __future__ import annotations

import argparse
import gc
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

import adafactor.torch
from shapes import GPT2_SMALL, LLAMA_LAYER, LORA, Shapes, parameters
from timing import HEADER, interleave

Step = Callable[[], object]
Tensors = list[torch.Tensor]


class Floor:
    def __init__(self, params: Tensors) -> None:
        self.params = params

    @torch.no_grad()
    def step(self) -> None:
        for p in self.params:
            assert p.grad is not None
            p.grad.sum()
            p.add_(p.grad, alpha=-1e-6)


OURS = "adafactor.torch.Adafactor"
OPTIMIZERS: dict[str, Callable[[Tensors], Any]] = {
    OURS: lambda params: adafactor.torch.Adafactor(params, lr=1e-3),
    f"{OURS}(stochastic_rounding)": lambda params: adafactor.torch.Adafactor(params, lr=1e-3, stochastic_rounding=True),
    "torch.optim.AdamW(fused=True)": lambda params: torch.optim.AdamW(params, fused=True),
    "the floor: g.sum() + p.add_(g)": Floor,
    "torch.optim.Adafactor": lambda params: torch.optim.Adafactor(params, lr=1e-3),
    "torch.optim.Adafactor(foreach=True)": lambda params: torch.optim.Adafactor(params, lr=1e-3, foreach=True),
    "transformers Adafactor": lambda params: transformers.optimization.Adafactor(params),
}
PEERS = list(OPTIMIZERS)[4:]

#: name, shapes, dtype, whether the slow peers run
CASES: list[tuple[str, Shapes, torch.dtype, bool]] = [
    ("Llama 7B layer", LLAMA_LAYER, torch.float32, True),
    ("Llama 7B layer", LLAMA_LAYER, torch.bfloat16, True),
    ("GPT-2 small", GPT2_SMALL, torch.float32, True),
    ("GPT-2 small", GPT2_SMALL, torch.bfloat16, True),
    ("1,000 LoRA matrices", LORA, torch.float32, True),
    ("1,000 LoRA matrices", LORA, torch.bfloat16, True),
]


def steps_of(names: list[str], shapes: Shapes, dtype: torch.dtype) -> dict[str, Step]:
    """A step per optimizer, each with parameters of its own; the gradients are shared."""
    generator = torch.Generator().manual_seed(0)
    gradients = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    steps: dict[str, Step] = {}
    for name in names:
        params = [(0.02 * torch.randn(shape, generator=generator)).to(dtype).requires_grad_() for shape in shapes]
        for p, g in zip(params, gradients, strict=True):
            p.grad = g
        steps[name] = OPTIMIZERS[name](params).step
    return steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=15, help="turns of ours, fused AdamW and the floor")
    parser.add_argument("--peer-repeats", type=int, default=3, help="turns of the slower peers")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, help="write the rows to this file as well")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    results: list[dict[str, Any]] = []
    for mix, shapes, dtype, slow in CASES:
        count = parameters(shapes)
        kind = str(dtype).removeprefix("torch.")
        print(f"\nPyTorch, {mix}, {kind}, {count / 1e6:.1f} M parameters, {arguments.threads} threads\n{HEADER}")
        fast = [name for name in OPTIMIZERS if name not in PEERS]
        if dtype == torch.float32:
            fast.remove(f"{OURS}(stochastic_rounding)")
        turns = [(fast, arguments.repeats)] + ([([OURS, *PEERS], arguments.peer_repeats)] if slow else [])
        for index, (names, repeats) in enumerate(turns):
            for row in interleave(steps_of(names, shapes, dtype), count, repeats):
                if index and row.name == OURS:
                    continue  # it is here as the peers' baseline
                print(row, flush=True)
                results.append({"mix": mix, "dtype": kind, "threads": arguments.threads, **vars(row)})
            gc.collect()
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
