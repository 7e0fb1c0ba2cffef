"""Time one optimizer step against the peers, on this machine: every installed framework, in under two minutes.

The optimizers of a framework take turns, and "times ours" is the median of the ratios turn by turn, so that a busy
machine slows all of them alike. A figure of another machine says little about this one.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path

from adafactor import __version__
from adafactor.cli.bench.timing import Budget, Case, measure
from adafactor.cli.command import check_outputs, integer, python, write_outputs
from adafactor.cli.terminal import table, transient
from adafactor.core import native
from adafactor.core.errors import Refused, message

SUMMARY = "time a step of every installed framework's optimizers against ours"

#: Turns at most, and seconds in all with imports and compilation: the rest of two minutes is for turns that have begun.
QUICK, FULL = (7, 80), (15, 86400)
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


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--only", action="append", choices=WHOLE, help="one framework; may be repeated (default: what is installed)")
    add("--whole-step", action="store_true", help="forward and backward passes too, of a 40.9 M parameter decoder")
    add("--full", action="store_true", help="larger PyTorch models, more turns, no hurry: what make bench runs")
    turns, limit = QUICK
    add("--repeats", type=integer("--repeats", 1, 1000), help=f"turns at most (default: {turns})")
    add("--seconds", type=integer("--seconds", 1, 86400), help=f"in all, roughly (default: {limit})")
    add("--json", metavar="FILE", help="write every figure to FILE")
    add("--plot", metavar="FILE", help="draw to FILE.png, .svg or .pdf")


def run(arguments: argparse.Namespace) -> int:
    """Measure, print, write and draw; 1 where a framework failed."""
    check_outputs("bench", arguments)
    suites = WHOLE if arguments.whole_step else SUITES
    extent = "whole" if arguments.whole_step else "full" if arguments.full else "quick"
    installed = [suite for suite, (_, modules, _) in suites.items() if all(map(importlib.util.find_spec, modules))]
    chosen = [suite for suite in WHOLE if suite in (arguments.only or installed)]
    missing = [suite for suite in chosen if suite not in installed]
    if missing or not chosen:
        rule = f"installed ({', '.join(installed) or 'nothing is'})"
        raise Refused(message("--only", rule, ", ".join(missing), 'Install with: pip install "adafactor[torch,jax]"'))
    machine = f"{platform.processor() or platform.machine()}, {os.cpu_count()} processors, {platform.system()}"
    kernels = native.why_not()
    print(f"{machine}; native kernels: {native.info().isa if kernels is None else f'none. {kernels}'}", flush=True)
    repeats, limit = QUICK if extent == "quick" else FULL
    limit = arguments.seconds or limit
    began, cases, failed, left_out = time.perf_counter(), list[tuple[str, Case]](), False, 0
    for number, suite in enumerate(chosen):
        deadline = time.time() + (limit - (time.perf_counter() - began)) / (len(chosen) - number)
        transient(f"{suite} …")
        try:
            for case in _measure(suite, arguments.repeats or repeats, deadline, extent):
                transient("")
                if isinstance(case, int):
                    left_out += case
                    continue
                print(f"\n{_table(case)}", flush=True)
                cases.append((suite, case))
                transient(f"{suite} …")
        except RuntimeError as error:
            failed = True
            print(f"\n{suite} failed: {error}", flush=True)
    transient("")
    seconds = time.perf_counter() - began
    if left_out:
        print(f"\n{left_out} cases were left out for lack of time: --seconds gives more.")
    print(
        f"\nTook {seconds:.0f} s. Times ours: 2.0 is twice our time; in CPU time of all threads, which other "
        "programs disturb less. --full takes more turns, over larger models."
    )
    told = [{"suite": suite, "title": case.title, "rows": case.rows} for suite, case in cases]
    data = {"adafactor": __version__, "machine": machine, "seconds": seconds, "cases": told}
    write_outputs(arguments, json.dumps(data, indent=1), partial(_draw, [case for _, case in cases]))
    return 1 if failed else 0


def _draw(cases: list[Case], file: Path) -> None:
    if cases:
        from adafactor.cli.picture import draw_times

        draw_times(cases, f"One optimizer step on {os.cpu_count()} processors: less is better", file)


def _measure(suite: str, repeats: int, deadline: float, extent: str) -> Iterator[Case | int]:
    """The cases of a framework, each as soon as it is measured, and at the end how many there was no time for.

    Raises:
        RuntimeError: its process failed; the text is its last line.
    """
    backend = (WHOLE if extent == "whole" else SUITES)[suite][2]
    environment = os.environ | {"TF_CPP_MIN_LOG_LEVEL": "3"}
    if backend is not None:
        environment["KERAS_BACKEND"] = backend
    command = python("from adafactor.cli.bench import work; work()", suite, str(repeats), str(deadline), extent)
    with (
        tempfile.TemporaryFile("w+") as errors,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment) as process,
    ):
        try:
            for line in process.stdout or ():
                if line.startswith("{"):
                    answer = json.loads(line)
                    yield Case(**answer) if "title" in answer else answer["left_out"]
            if process.wait() != 0:
                errors.seek(0)
                said = errors.read().strip().splitlines()
                raise RuntimeError(said[-1] if said else f"exit code {process.returncode}")
        finally:
            process.kill()


def work() -> None:
    """That process: measure the suite of its first argument, and print JSON line by line.

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


def _table(case: Case) -> str:
    figures = [name for name in ("accessed", "temporary") if name in case.rows[0]]
    names = ("ms", "ns_per_parameter", "ratio", "cpu_ratio", *figures)
    rows = [[row["name"], *(f"{row[name]:.2f}" for name in names)] for row in case.rows]
    return f"{case.title}\n{table(['', 'ms', 'ns per parameter', 'times ours', 'in CPU time', *figures], rows)}"
