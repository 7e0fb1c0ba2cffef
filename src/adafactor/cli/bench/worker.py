"""One framework's measurements in a process of its own: ``adafactor bench`` starts it, and reads JSON line by line."""

from __future__ import annotations

import importlib
import json
import sys
from dataclasses import asdict

from adafactor.cli.bench.timing import Budget, measure

#: By the module that measures: what ``adafactor bench`` calls it, what it imports, its ``KERAS_BACKEND``.
SUITES: dict[str, tuple[str, tuple[str, ...], str | None]] = {
    "torch": ("pytorch", ("torch",), None),
    "jax": ("jax", ("jax", "optax"), None),
    "keras-jax": ("keras", ("keras", "jax"), "jax"),
    "keras-tensorflow": ("keras", ("keras", "tensorflow"), "tensorflow"),
    "keras-torch": ("keras", ("keras", "torch"), "torch"),
}

#: The same of whole training steps, ``--whole-step``.
WHOLE = {suite: ("whole", modules, backend) for suite, (_, modules, backend) in SUITES.items()} | {
    "jax": ("whole", ("keras", "jax", "optax"), "jax"),  # optax over Keras's model
    "keras-tensorflow-jit": ("whole", ("keras", "tensorflow"), "tensorflow"),
}


def main() -> None:
    """Measure the suite of the first argument.

    The second is the turns, the third the time at which to be done, the fourth "full", "quick" or "whole".
    """
    suite, repeats, deadline, extent = sys.argv[1:]
    whole = extent == "whole"
    module = importlib.import_module(f"adafactor.cli.bench.{(WHOLE if whole else SUITES)[suite][0]}")
    problems = module.problems(suite if whole else extent == "full")
    budget = Budget(float(deadline), len(problems))
    for done, problem in enumerate(problems):
        end = budget.next()
        if end is None:
            print(json.dumps({"left_out": len(problems) - done}))
            break
        print(json.dumps(asdict(measure(problem, int(repeats), end))), flush=True)
