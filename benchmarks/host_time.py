"""What a step costs the host besides the arithmetic: python benchmarks/host_time.py [--json FILE]

Steps over 9, 148 and 1,000 small tensors on the CPU, in turns with torch.optim.AdamW(fused=True), by the CPU time of
one thread: with the native kernels, and as on a GPU, where a mocked device takes the launches and carries nothing out.
Launching itself, some microseconds for each of about ten kernels whatever the number of tensors, is not in these.
"""

from __future__ import annotations

import argparse
import json
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


def cpu_seconds(step: Step) -> float:
    start = time.thread_time()
    step()
    return time.thread_time() - start


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=200)
    parser.add_argument("--json", type=Path, help="write the rows to this file as well")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    JITFunction.run = lambda kernel, *args, **kwargs: None
    rows: list[dict[str, Any]] = []
    for shapes in (LLAMA_LAYER, GPT2_SMALL, LORA):
        small = [tuple(-(-n // 64) for n in shape) for shape in shapes]
        steps = {name: made.step for name, made in optimizers(small).items()}
        times = take_turns(steps, arguments.repeats, cpu_seconds)
        for name, taken in times.items():
            ms, times_adamw = 1e3 * statistics.median(taken), ratio(times, name, ADAMW)
            print(f"{len(shapes):5} tensors  {name:<30} {ms:7.3f} ms  {times_adamw:5.2f} of AdamW's", flush=True)
            rows.append({"tensors": len(shapes), "name": name, "ms": ms, "ratio": times_adamw})
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
