"""Timing that holds on a shared machine: candidates take turns, and ratios are taken turn by turn."""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from adafactor.cli.bench.shapes import Shapes, parameters

#: Does a candidate's work once, and returns when it is done.
Step = Callable[[], object]
Times = dict[str, list[Any]]


def seconds(step: Step) -> float:
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def wall_and_cpu(step: Step) -> tuple[float, float]:
    """Seconds that passed, and those that all threads of this process computed in."""
    start = time.process_time()
    return seconds(step), time.process_time() - start


def take_turns(
    steps: Mapping[str, Step], repeats: int, clock: Callable[[Step], Any] = seconds, end: float = math.inf
) -> Times:
    """Run every step in turn, ``repeats`` times after a warm-up of two, and return what ``clock`` says of each run.

    In its turn a step runs twice, and the second run counts: the first pays for what the one before has left to the
    system, such as 128 MB of temporaries to give back.

    Args:
        clock: runs a step and says how long that took.
        end: as ``time.time`` counts; no new turn begins after it, as soon as one has been measured.
    """
    times: Times = {name: [] for name in steps}
    for turn in range(-2, repeats):
        if turn > 0 and time.time() > end:
            break
        for name, step in steps.items():
            step()
            taken = clock(step)
            if turn >= 0:
                times[name].append(taken)
    return times


def ratio(times: Times, name: str, baseline: str) -> float:
    """The median of the ratios turn by turn."""
    return float(statistics.median(a / max(b, 1e-9) for a, b in zip(times[name], times[baseline], strict=True)))


@dataclass(frozen=True)
class Candidate:
    """A step, and what is known of it besides its time."""

    step: Step
    figures: dict[str, float] = field(default_factory=dict)


class Group(NamedTuple):
    """Candidates that take turns with each other, and the fraction of the turns that they get."""

    make: Callable[[], dict[str, Candidate]]
    turns: float = 1.0


@dataclass(frozen=True)
class Problem:
    """What is to be timed side by side.

    Attributes:
        labels: what tells this problem from its suite's others, in every row.
        parameters: how many there are.
        groups: each holds the candidate of the first one that all ratios are to.
    """

    title: str
    labels: dict[str, Any]
    parameters: int
    groups: Sequence[Group]


def over(what: str, labels: dict[str, Any], shapes: Shapes, groups: Sequence[Group]) -> Problem:
    """One step over a mix of shapes, float32 unless the labels say otherwise."""
    count = parameters(shapes)
    threads = f", {labels['threads']} threads" if "threads" in labels else ""
    title = f"{what}, {labels['mix']}, {labels.get('dtype', 'float32')}, {count / 1e6:.1f} M parameters{threads}"
    return Problem(title, labels, count, groups)


@dataclass(frozen=True)
class Case:
    """What was timed side by side: a line that says what, and a row per candidate as plain data for JSON.

    A row has the candidate's ``name``, the medians of its ``ms`` and ``ns_per_parameter``, the median ``ratio`` to the
    baseline and that of their CPU times, of how many ``turns``, the problem's labels and the candidate's own figures.
    """

    title: str
    rows: list[dict[str, Any]]


def measure(problem: Problem, repeats: int, end: float = math.inf) -> Case:
    """Time every candidate against the first."""
    rows: list[dict[str, Any]] = []
    for left, group in zip(range(len(problem.groups), 0, -1), problem.groups, strict=True):
        candidates = group.make()
        until = time.time() + (end - time.time()) / left
        steps = {name: candidate.step for name, candidate in candidates.items()}
        times = take_turns(steps, max(1, round(repeats * group.turns)), wall_and_cpu, until)
        wall, cpu = ({name: [each[k] for each in taken] for name, taken in times.items()} for k in range(2))
        baseline = rows[0]["name"] if rows else next(iter(candidates))
        for name, candidate in candidates.items():
            if not rows or name != baseline:
                took = statistics.median(wall[name])
                row = {"name": name, "ms": took * 1e3, "ns_per_parameter": took * 1e9 / problem.parameters}
                row |= {"ratio": ratio(wall, name, baseline), "cpu_ratio": ratio(cpu, name, baseline)}
                row["turns"] = len(wall[name])
                rows.append(problem.labels | row | candidate.figures)
        del candidates, steps
        gc.collect()
    return Case(problem.title, rows)


@dataclass
class Budget:
    """Time for a number of cases: those that come later share what the earlier ones have left.

    Attributes:
        deadline: as ``time.time`` counts.
        cases: how many are still to come.
    """

    deadline: float
    cases: int
    begun: bool = False

    def next(self) -> float | None:
        """When the next case should end; ``None`` where there is no time left for it. The first one always has some."""
        left = max(0.0, self.deadline - time.time())
        share, self.cases = left / max(1, self.cases), self.cases - 1
        if self.begun and not left:
            return None
        self.begun = True
        return time.time() + share
