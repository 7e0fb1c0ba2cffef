"""Step time of the PyTorch optimizers on the CPU: python benchmarks/torch_step.py

Ratios are to ours, in the same run, turn by turn: 2.0 means that ours is twice as fast. `adafactor.cli.bench.pytorch`
has the candidates, the floor among them.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from adafactor.cli.bench.pytorch import CASES, measure
from adafactor.cli.bench.timing import HEADER, Budget, line


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=15, help="turns of ours, fused AdamW and the floor")
    parser.add_argument("--peer-repeats", type=int, default=3, help="turns of the slower peers")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, help="write the rows to this file as well")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    results: list[dict[str, Any]] = []
    for case in measure(CASES, arguments.repeats, arguments.peer_repeats, Budget()):
        print(f"\n{case.title}\n{HEADER}", *map(line, case.rows), sep="\n", flush=True)
        results += case.rows
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
