"""Peak extra memory of a PyTorch step over the kernels of a Llama 7B layer: python benchmarks/torch_memory.py

One fresh process per optimizer and dtype. Extra is the peak of the resident set during two steps, the first of which
creates the state, above what parameters and gradients took before. Linux only (/proc/self).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any


def resident(field: str) -> int:
    """Bytes of the resident set now (VmRSS) or at its peak (VmHWM)."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def measure(name: str, dtype: str) -> dict[str, Any]:
    import torch

    from adafactor.cli.bench.pytorch import OPTIMIZERS
    from adafactor.cli.bench.shapes import LLAMA_LAYER, parameters

    torch.set_num_threads(2)
    params = []
    for shape in LLAMA_LAYER:
        p = torch.full(shape, 0.02, dtype=getattr(torch, dtype)).requires_grad_()
        p.grad = torch.full(shape, 0.01, dtype=p.dtype)
        params.append(p)
    warm = torch.ones(8, 8).requires_grad_()  # code that is loaded at the first step is not the step's memory
    warm.grad = torch.ones(8, 8)
    OPTIMIZERS[name]([warm]).step()
    optimizer = OPTIMIZERS[name](params)
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    for _ in range(2):
        optimizer.step()
    extra = resident("VmHWM") - before
    size = parameters(LLAMA_LAYER) * params[0].element_size()
    return {"name": name, "dtype": dtype, "extra_bytes": extra, "of_parameters": extra / size}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the rows to this file as well")
    parser.add_argument("--only", nargs=2, metavar=("NAME", "DTYPE"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.only:
        print(json.dumps(measure(*arguments.only)))
        return
    from adafactor.cli.bench.pytorch import OPTIMIZERS

    rows = []
    print(f"{'':<44} {'dtype':>9} {'extra MB':>9} {'of parameters':>14}")
    for dtype in ("float32", "bfloat16"):
        for name in OPTIMIZERS:
            command = [sys.executable, __file__, "--only", name, dtype]
            output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            row = json.loads(output.splitlines()[-1])
            rows.append(row)
            print(f"{name:<44} {dtype:>9} {row['extra_bytes'] / 1e6:9.1f} {row['of_parameters']:14.2%}", flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=2))


if __name__ == "__main__":
    main()
