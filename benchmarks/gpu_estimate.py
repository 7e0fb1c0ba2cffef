"""AN ESTIMATE of a step's time on devices that need not be there: python benchmarks/gpu_estimate.py [--json FILE]

Nothing here was measured. Every launch of a step whose Σx² is known is compiled, and takes by this model the longer of

  - its bytes over the bandwidth, less where the loads that its programs have in flight do not cover the latency
    (a last wave of programs that leaves multiprocessors empty has fewer of them)
  - its machine instructions over what the schedulers issue, of which ISSUED is taken as reachable

and START besides. What comes out is a fraction of the copy bandwidth, for 16 bytes per float32 parameter and 8 per
bfloat16 parameter.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

import gpu_static
from adafactor.cli.bench.shapes import GPT2_SMALL, LLAMA_LAYER, LORA, Shapes, parameters
from adafactor.engine.torch.triton import table
from adafactor.torch import Adafactor

START, ISSUED = 2.5e-6, 0.7


class Device(NamedTuple):
    """``copy``: bytes per second, read and written, that copying reaches; ``latency`` of a load, in seconds."""

    name: str
    multiprocessors: int
    copy: float
    clock: float
    latency: float


DEVICES = {90: Device("H100 SXM", 132, 2.9e12, 1.7e9, 0.7e-6), 80: Device("A100 SXM 80 GB", 108, 1.7e12, 1.4e9, 0.6e-6)}
MIXES: dict[str, Shapes] = {"Llama 7B layer": LLAMA_LAYER, "GPT-2 small": GPT2_SMALL, "1,000 LoRA matrices": LORA}


def field(records: Any, name: str) -> Any:
    return records[:, table.FIELDS.index(name)]


def seconds(capability: int, call: Any, records: Any) -> float:
    """The model's time of one launch."""
    device, (kernel, args, kwargs) = DEVICES[capability], call
    name = kernel.fn.__name__
    if name in ("begin", "slices", "finish"):
        return START
    blocks = next(a for a in args if torch.is_tensor(a) and a.dim() == 2 and a.shape[1] == 5)
    its = records[np.unique(blocks[:, 0].numpy())]
    size = int(field(its, "size").sum())
    sums = 8 * int((field(its, "parts") * field(its, "matrices") * field(its, "m")).sum())
    row = gpu_static.row(capability, kernel, args, kwargs)
    moved = size * row["bytes"] + (sums if name in ("measure", "columns") else 0)
    programs, at_once = len(blocks), row["resident"] * device.multiprocessors
    stages = kwargs.get("STAGES", 1)
    written = kwargs["PARAM"].primitive_bitwidth // 8 if name not in ("measure", "measure_flat", "columns") else 0
    in_flight = gpu_static.elements(name, kwargs) * (row["bytes"] - written) * (stages - 1 or 0.5)
    if name == "columns":
        in_flight = kwargs["K"] * kwargs["P"] * kwargs["C"] * 8
    covered = device.copy * device.latency  # bytes in flight that the bandwidth needs
    waves, rest = divmod(programs, at_once)
    part = moved / programs
    read = sum(
        count * part / (device.copy * min(1.0, min(count, at_once) * in_flight / covered))
        for count in (waves * at_once, rest)
        if count
    )
    issued = (row["instructions"] or 0) * size / (device.multiprocessors * 128 * device.clock * ISSUED)
    return START + max(read, issued)


def step(capability: int, shapes: Shapes, dtype: torch.dtype) -> tuple[float, int]:
    """The model's time of a step, and its launches. The tensors take no memory: nobody writes to them."""
    params = [torch.nn.Parameter(torch.empty(shape, dtype=dtype)) for shape in shapes]
    optimizer = Adafactor(params)
    for p in params:
        p.grad = torch.empty_like(p)
    gpu_static.compiling.recorded(optimizer.step)
    calls = gpu_static.compiling.recorded(optimizer.step)
    (prepared,) = optimizer._preparation._prepared.values()
    assert prepared.plan is not None
    ((backend, _),) = prepared.plan.backends
    return sum(seconds(capability, call, backend.tables.plan.records) for call in calls), len(calls)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the rows to this file as well")
    arguments = parser.parse_args()
    rows = []
    for capability, device in DEVICES.items():
        gpu_static.compiling.accelerator.shared_memory = lambda device, capability=capability: gpu_static.SHARED[
            capability
        ]
        print(f"\n{device.name}: ESTIMATES of a model, nothing was measured")
        for mix, shapes in MIXES.items():
            for dtype in (torch.float32, torch.bfloat16):
                taken, launches = step(capability, shapes, dtype)
                share = 4 * dtype.itemsize * parameters(shapes) / taken / device.copy
                kind = str(dtype).removeprefix("torch.")
                ms = 1e3 * taken
                print(f"{mix:<20} {kind:<9} {launches:3} launches {ms:7.3f} ms  {share:5.2f} of copying", flush=True)
                rows.append({"device": device.name, "mix": mix, "dtype": kind, "estimated_ms": ms, "of_copy": share})
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
