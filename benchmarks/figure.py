"""Draw the PyTorch step times: python benchmarks/figure.py build/bench/torch.json docs/images/torch-step.png"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from adafactor.cli.bench.picture import draw
from adafactor.cli.bench.timing import Case


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", type=Path, help="what torch_step.py --json wrote")
    parser.add_argument("target", type=Path, help="the picture to write")
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = json.loads(arguments.source.read_text())
    cases: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        cases.setdefault(f"{row['mix']}, {row['dtype']}", []).append(row)
    title = f"One optimizer step on a CPU, {rows[0]['threads']} threads: less is better"
    draw([Case(name, members) for name, members in cases.items()], title, arguments.target)


if __name__ == "__main__":
    main()
