"""Step time of the Keras optimizers on one backend: KERAS_BACKEND=jax python benchmarks/keras_step.py

Ratios are to ours, in the same run: 2.0 means that ours is twice as fast.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from adafactor.cli.bench.keras import measure
from adafactor.cli.bench.timing import HEADER, Budget, line


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--json", type=Path, help="write the rows to this file as well")
    arguments = parser.parse_args()
    results: list[dict[str, Any]] = []
    for case in measure(arguments.repeats, Budget()):
        print(f"\n{case.title}\n{HEADER}", *map(line, case.rows), sep="\n", flush=True)
        results += case.rows
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
