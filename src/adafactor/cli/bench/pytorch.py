"""Step time of the PyTorch optimizers on the CPU.

The floor reads every gradient, then reads it again and adds it to its parameter (``g.sum()`` and ``p.add_(g)``): what
an exact Adafactor cannot avoid.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

import adafactor.torch
from adafactor.cli.bench.shapes import GPT2_SMALL, LLAMA_LAYER, LORA, MATRIX, Shapes, transformer
from adafactor.cli.bench.timing import Candidate, Group, Problem, over

Tensors = list[torch.Tensor]


class Floor:
    """No optimizer: the reads and writes that one cannot do without."""

    def __init__(self, params: Tensors) -> None:
        self.params = params

    @torch.no_grad()
    def step(self) -> None:
        for p in self.params:
            assert p.grad is not None
            p.grad.sum()
            p.add_(p.grad, alpha=-1e-6)


def _transformers(params: Tensors) -> Any:
    from transformers.optimization import Adafactor

    return Adafactor(params)


OURS = "adafactor.torch.Adafactor"
ROUNDED = f"{OURS}(stochastic_rounding)"
OPTIMIZERS: dict[str, Callable[[Tensors], Any]] = {
    OURS: lambda params: adafactor.torch.Adafactor(params, lr=1e-3),
    ROUNDED: lambda params: adafactor.torch.Adafactor(params, lr=1e-3, stochastic_rounding=True),
    "torch.optim.AdamW(fused=True)": lambda params: torch.optim.AdamW(params, fused=True),
    "the floor: g.sum() + p.add_(g)": Floor,
    "torch.optim.Adafactor": lambda params: torch.optim.Adafactor(params, lr=1e-3),
    "torch.optim.Adafactor(foreach=True)": lambda params: torch.optim.Adafactor(params, lr=1e-3, foreach=True),
}
if importlib.util.find_spec("transformers") is not None:
    OPTIMIZERS["transformers Adafactor"] = _transformers
#: The slow ones, which take fewer turns.
PEERS = list(OPTIMIZERS)[4:]

Mix = tuple[str, Shapes, torch.dtype]
FULL: list[Mix] = [
    (name, shapes, dtype)
    for name, shapes in (("Llama 7B layer", LLAMA_LAYER), ("GPT-2 small", GPT2_SMALL), ("1,000 LoRA matrices", LORA))
    for dtype in (torch.float32, torch.bfloat16)
]
QUICK: list[Mix] = [
    ("4096x4096", MATRIX, torch.float32),
    ("4096x4096", MATRIX, torch.bfloat16),
    ("Transformer", transformer(), torch.float32),
    ("1,000 LoRA matrices", LORA, torch.float32),
]


def candidates(names: Sequence[str], shapes: Shapes, dtype: torch.dtype) -> dict[str, Candidate]:
    """A step per optimizer, each with parameters of its own; the gradients are shared."""
    generator = torch.Generator().manual_seed(0)
    gradients = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    made: dict[str, Candidate] = {}
    for name in names:
        params = [(0.02 * torch.randn(shape, generator=generator)).to(dtype).requires_grad_() for shape in shapes]
        for p, g in zip(params, gradients, strict=True):
            p.grad = g
        made[name] = Candidate(OPTIMIZERS[name](params).step)
    return made


def problem(mix: str, shapes: Shapes, dtype: torch.dtype) -> Problem:
    """Ratios are to ours. The slow peers take their turns with ours again, apart from the others."""
    kind, threads = str(dtype).removeprefix("torch."), torch.get_num_threads()
    fast = [name for name in OPTIMIZERS if name not in PEERS and (name != ROUNDED or dtype != torch.float32)]
    groups = [
        Group(partial(candidates, fast, shapes, dtype)),
        Group(partial(candidates, [OURS, *PEERS], shapes, dtype), turns=0.3),
    ]
    labels = {"mix": mix, "dtype": kind, "threads": threads}
    return over(f"PyTorch {torch.__version__}", labels, shapes, groups)


def problems(full: bool) -> list[Problem]:
    return [problem(*mix) for mix in (FULL if full else QUICK)]
