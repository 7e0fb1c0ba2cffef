"""Every conversion between eight optimizers, measured: what became of the state, and where the moved run ends.

    python tests/helpers/conversion_matrix.py [--steps 100]

trains that many steps in one optimizer, converts, trains as many in the other, and compares the parameters with those
of the run that never moved: the largest difference, relative to each parameter's largest element.
"""

import argparse
import os

os.environ.setdefault("KERAS_BACKEND", "torch")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import conversion_runs as runs
import numpy as np

from adafactor import Factored, Hyperparameters
from adafactor import layout as layout_of
from adafactor.convert.axes import fitted
from adafactor.convert.report import Report
from adafactor.convert.state import Parameter
from adafactor.core import reference

WORDS = {"kept": "exact", "means": "means", "rebuilt": "rebuilt"}


def table(found, names):
    """Sources down, targets across."""
    print(f"| from \\ to | {' | '.join(names)} |\n|---|{'---|' * len(names)}")
    for source in names:
        cells = []
        for target in names:
            if source == target:
                cells.append("")
                continue
            report, difference = found[source, target]
            hows = {change.how for change in report.changes}
            word = next(WORDS[how] for how in ("rebuilt", "means", "kept") if how in hows)
            cells.append(f"{word if report.exact or word != 'exact' else 'NOT exact'} {difference:.0e}")
        print(f"| {source} | {' | '.join(cells)} |")
    print()


def other_axes(steps):
    """A convolution kernel over other axes: against the statistics that the target has had from the start."""
    shape, rng = (3, 3, 32, 64), np.random.default_rng(0)
    policies = {
        "none": None,
        "last two": Factored((2,), (3,)),
        "first two": Factored((0,), (1,)),
        "smallest": Factored((0, 1, 2), (3,)),
    }
    layouts = {name: layout_of(shape, lambda *_, spec=spec: spec) for name, spec in policies.items()}
    found = {name: reference.init(layout, Hyperparameters()) for name, layout in layouts.items()}
    scale = np.exp(rng.normal(size=shape))  # of every weight's gradient, which no rank-1 matrix has
    for _ in range(steps):
        g = scale * rng.normal(size=shape)
        for name, layout in layouts.items():
            _, found[name] = reference.step(g, g, found[name], layout, Hyperparameters(), 1e-2)
    print("| from \\ to, factored over | how | estimate moved by | statistics off by |\n|---|---|---|---|")
    for source, old in layouts.items():
        for target, new in layouts.items():
            if source == target:
                continue
            report = Report()
            parameter = Parameter("w", old, found[source].second_moment, steps)
            got = fitted(parameter, new, report).slots
            own = found[target].second_moment
            off = max(np.linalg.norm(got[slot] - own[slot]) / np.linalg.norm(own[slot]) for slot in own)
            change = report.changes[0]
            print(f"| {source} → {target} | {WORDS[change.how]} | {change.estimate_change:.2g} | {off:.1g} |")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100, help="before, and after the conversion")
    steps = parser.parse_args().steps
    for settings in (runs.SETTINGS, runs.MOMENTUM):
        table(runs.matrix(settings, steps), list(runs.runs(settings)))
    other_axes(steps)


if __name__ == "__main__":
    main()
