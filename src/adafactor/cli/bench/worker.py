"""One framework's measurements in a process of its own: ``adafactor bench`` starts it, and reads JSON line by line."""

from __future__ import annotations

import importlib
import json
import sys
from dataclasses import asdict

from adafactor.cli.bench.timing import Budget

#: By the module that measures: what ``adafactor bench`` calls it, what it imports, its ``KERAS_BACKEND``.
SUITES: dict[str, tuple[str, tuple[str, ...], str | None]] = {
    "torch": ("pytorch", ("torch",), None),
    "jax": ("jax", ("jax", "optax"), None),
    "keras-jax": ("keras", ("keras", "jax"), "jax"),
    "keras-tensorflow": ("keras", ("keras", "tensorflow"), "tensorflow"),
    "keras-torch": ("keras", ("keras", "torch"), "torch"),
}


def main() -> None:
    """Measure the suite of the first argument: the second is the turns, the third the time at which to be done."""
    suite, repeats, deadline = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
    module = importlib.import_module(f"adafactor.cli.bench.{SUITES[suite][0]}")
    budget = Budget(deadline, module.COUNT)
    found = 0
    for case in module.quick(repeats, budget):
        print(json.dumps(asdict(case)), flush=True)
        found += 1
    print(json.dumps({"left_out": module.COUNT - found}))
