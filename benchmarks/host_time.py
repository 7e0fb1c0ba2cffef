"""What a step costs the host besides the arithmetic: python benchmarks/host_time.py [--json FILE]

Steps over 9, 148 and 1,000 small tensors on the CPU, in turns with torch.optim.AdamW(fused=True), by the CPU time of
one thread: with the native kernels, and as on a GPU, where a mocked device takes the launches and carries nothing out.
Launching itself, some microseconds for each of about ten kernels whatever the number of tensors, is not in these. At
last 1,000 tensors of which others have a gradient at every step, as in a mixture of experts.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from triton.runtime.jit import JITFunction

import adafactor.torch
from adafactor.cli.bench.shapes import GPT2_SMALL, LLAMA_LAYER, LORA, Shapes
from adafactor.cli.bench.timing import Step, ratio, take_turns
from adafactor.engine.torch import choose, cpu, cuda
from adafactor.engine.torch.triton import table

ADAMW, NATIVE, TRITON = "torch.optim.AdamW(fused=True)", "native kernels", "Triton kernels, not launched"


def optimizers(shapes: Shapes) -> dict[str, torch.optim.Optimizer]:
    made: dict[str, torch.optim.Optimizer] = {}
    for name in (ADAMW, NATIVE, TRITON):
        params = [torch.full(shape, 0.02).requires_grad_() for shape in shapes]
        for p in params:
            p.grad = torch.ones_like(p)
        made[name] = (torch.optim.AdamW if name == ADAMW else adafactor.torch.Adafactor)(params, lr=1e-3, fused=True)
        with mock.patch.object(choose, "kernels_on", return_value=cuda.Triton if name == TRITON else cpu.Native):
            made[name].step()  # chooses, for all steps
    return made


def timed(optimizer: torch.optim.Optimizer, share: float) -> Step:
    """A step that returns its CPU time; before it a ``share`` of the parameters gets a gradient, drawn anew."""
    params = optimizer.param_groups[0]["params"]
    grads, draw = [p.grad for p in params], random.Random(0)

    def step() -> float:
        if share < 1:
            for p, grad in zip(params, grads, strict=True):
                p.grad = grad if draw.random() < share else None
        start = time.thread_time()
        optimizer.step()
        return time.thread_time() - start

    return step


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=200)
    parser.add_argument("--json", type=Path, help="write the rows to this file as well")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    JITFunction.run = lambda kernel, *args, **kwargs: None
    table.ON_CHIP = 0  # the tensors stand for large ones, and take their launches
    rows: list[dict[str, Any]] = []
    for shapes, share in ((LLAMA_LAYER, 1.0), (GPT2_SMALL, 1.0), (LORA, 1.0), (LORA, 0.7)):
        made = optimizers([tuple(-(-n // 64) for n in shape) for shape in shapes])
        times = take_turns(
            {name: timed(each, share) for name, each in made.items()}, arguments.repeats, lambda step: step()
        )
        print(f"{len(shapes)} tensors, of which {share:.0%} have a gradient")
        for name, taken in times.items():
            ms, times_adamw = 1e3 * statistics.median(taken), ratio(times, name, ADAMW)
            print(f"    {name:<30} {ms:7.3f} ms  {times_adamw:5.2f} of AdamW's", flush=True)
            rows.append({"tensors": len(shapes), "share": share, "name": name, "ms": ms, "ratio": times_adamw})
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
