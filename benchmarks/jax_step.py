"""Step time of optax transformations, jitted and donated: python benchmarks/jax_step.py

Ratios are to `optax.adamw`, in the same run: 0.5 means that a step takes half as long as AdamW's.
`adafactor.cli.bench.jax` has the candidates, and says what the columns of memory are.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from adafactor.cli.bench.jax import measure
from adafactor.cli.bench.timing import HEADER, Budget, line
from adafactor.engine.xla import custom_call


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--json", type=Path, help="write the rows to this file as well")
    arguments = parser.parse_args()
    print(f"native kernels inside jit: {custom_call.why_not() or 'yes'}")
    results: list[dict[str, Any]] = []
    for case in measure(arguments.repeats, "optax.adamw", Budget()):
        print(f"\n{case.title}\n{HEADER} {'accessed':>9} {'temporary':>9}")
        for row in case.rows:
            print(f"{line(row)} {row['accessed']:9.1f} {row['temporary']:9.2f}", flush=True)
        results += case.rows
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
