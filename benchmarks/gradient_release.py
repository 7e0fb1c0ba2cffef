"""Peak memory of a PyTorch training step with and without gradient release: python benchmarks/gradient_release.py

A model of linear layers, forward and backward on a small batch, so that weights, gradients and state are what counts.
One fresh process per way of training. Peak is the highest resident set during three steps, above what the process had
before it made the model. Linux only (/proc/self).

glibc maps large blocks one by one and unmaps them when they are freed, but moves its threshold for "large" up to the
blocks that it has seen freed, 32 MB at most: gradients then share a heap with small blocks, which keep its holes from
closing. The processes therefore run with a fixed threshold of 1 MB, but for one row that shows the difference.

The time that a tensor costs by itself is CPU time on one thread, the least of all turns.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from adafactor.cli.bench.timing import take_turns, wall_and_cpu

LAYERS, WIDTH, BATCH = 24, 2048, 8
SMALL = 400  # layers of 32 x 32, for the time that each tensor costs
WAYS = (
    "AdamW, step()",
    "Adafactor, step()",
    "Adafactor, step_in_backward",
    "the same, bfloat16",
    "compensated bfloat16",
)


def trainer(way: str, layers: int, width: int) -> tuple[Any, Callable[[], None]]:
    """The model, and a function that makes one training step."""
    import torch

    from adafactor.torch import Adafactor, step_in_backward

    torch.manual_seed(0)
    dtype = torch.bfloat16 if "bfloat16" in way else torch.float32
    with torch.device("cpu"):
        model = torch.nn.Sequential(*[torch.nn.Linear(width, width, bias=False, dtype=dtype) for _ in range(layers)])
    released = way not in WAYS[:2]
    if way.startswith("AdamW"):
        optimizer: torch.optim.Optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    else:
        rounding = {"compensated": True} if way.startswith("comp") else {"stochastic_rounding": dtype != torch.float32}
        ours = Adafactor(model.parameters(), **rounding)
        optimizer = ours
        if released:
            step_in_backward(model, ours)
    x = torch.randn(BATCH, width).to(dtype)

    def step() -> None:
        model(x).square().mean().backward()
        if not released:
            optimizer.step()
            optimizer.zero_grad()

    return (model, optimizer), step


def measure(way: str) -> dict[str, Any]:
    import torch

    from torch_memory import resident

    torch.set_num_threads(2)
    trainer(way, 2, 64)[1]()  # code that is loaded at the first step is not the step's memory
    before = resident("VmRSS")
    (model, optimizer), step = trainer(way, LAYERS, WIDTH)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    for _ in range(3):
        step()
    peak = resident("VmHWM") - before
    weights = [p.numel() * p.element_size() for p in model.parameters()]
    state = sum(v.numel() * v.element_size() for values in optimizer.state.values() for v in values.values())
    return {"way": way, "peak": peak, "weights": sum(weights), "largest gradient": max(weights), "state": state}


def times(repeats: int = 30) -> dict[str, float]:
    """Milliseconds of CPU time of a training step with many small layers."""
    import torch

    torch.set_num_threads(1)
    taken = take_turns({way: trainer(way, SMALL, 32)[1] for way in WAYS[1:3]}, repeats, wall_and_cpu)
    return {way: 1e3 * min(cpu for _, cpu in values) for way, values in taken.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the rows to this file as well")
    parser.add_argument("--only", metavar="WAY", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.only:
        print(json.dumps(times() if arguments.only == "times" else measure(arguments.only)))
        return

    def run(what: str, fixed: bool = True) -> dict[str, Any]:
        environment = {**os.environ, **({"MALLOC_MMAP_THRESHOLD_": str(1 << 20)} if fixed else {})}
        command = [sys.executable, __file__, "--only", what]
        done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
        found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return found

    print(f"{LAYERS} layers of {WIDTH} x {WIDTH}, {LAYERS * WIDTH * WIDTH:,} parameters; MB")
    print(f"{'':<42} {'peak':>7} {'weights':>8} {'gradients':>10} {'state':>7} {'the rest':>9}")
    rows = []
    for way, fixed in [*((way, True) for way in WAYS), (WAYS[2], False)]:
        row = run(way, fixed)
        row["fixed threshold"] = fixed
        rows.append(row)
        gradients = row["weights"] if way in WAYS[:2] else row["largest gradient"]
        rest = row["peak"] - row["weights"] - gradients - row["state"]
        numbers = [value / 1e6 for value in (row["peak"], row["weights"], gradients, row["state"], rest)]
        name = way if fixed else f"{way}, glibc's own"
        print("{:<42} {:7.1f} {:8.1f} {:10.1f} {:7.1f} {:9.1f}".format(name, *numbers), flush=True)
    taken = run("times")
    print(f"\nCPU milliseconds of a training step, {SMALL} layers of 32 x 32")
    for name, value in taken.items():
        print(f"{name:<42} {value:7.2f}")
    if arguments.json:
        arguments.json.write_text(json.dumps({"memory": rows, "times": taken}, indent=2))


if __name__ == "__main__":
    main()
