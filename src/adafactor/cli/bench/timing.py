"""Timing that holds on a shared machine: candidates take turns, and ratios are taken turn by turn."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Row:
    """One candidate's step time: median in nanoseconds per parameter, and the median ratio to the baseline.

    ``turns`` says of how many turns.
    """

    name: str
    ns_per_parameter: float
    ratio: float
    turns: int


@dataclass(frozen=True)
class Case:
    """What was timed side by side: a line that says what, and a row per candidate as plain data for JSON."""

    title: str
    rows: list[dict[str, Any]]


@dataclass
class Budget:
    """Time for a number of cases: those that come later share what the earlier ones have left.

    Attributes:
        deadline: as ``time.time`` counts; by default there is all the time.
        cases: how many are still to come.
    """

    deadline: float = math.inf
    cases: int = 1
    begun: bool = False

    def next(self) -> float | None:
        """When the next case should end; ``None`` where there is no time left for it. The first one always has some."""
        left = max(0.0, self.deadline - time.time())
        share, self.cases = left / max(1, self.cases), self.cases - 1
        if self.begun and not left:
            return None
        self.begun = True
        return time.time() + share


HEADER = f"{'':<44} {'ns/param':>9} {'ratio':>9}"


def line(row: dict[str, Any]) -> str:
    """A row of a case under ``HEADER``."""
    return f"{row['name']:<44} {row['ns_per_parameter']:9.2f} {row['ratio']:9.2f}"


def interleave(
    steps: Mapping[str, Callable[[], object]],
    parameters: int,
    repeats: int = 15,
    baseline: str | None = None,
    end: float = math.inf,
) -> list[Row]:
    """Run every step in turn, ``repeats`` times after a warm-up of two, and compare to the baseline (the first).

    Each callable must return only when its work is done. In its turn it runs twice, and the second run counts: the
    first pays for what the one before has left to the system, such as 128 MB of temporaries to give back.

    Args:
        end: as ``time.time`` counts; no new turn begins after it, as soon as one has been measured.
    """
    baseline = baseline or next(iter(steps))
    times: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(repeats + 2):
        if times[baseline] and time.time() > end:
            break
        for name, step in steps.items():
            step()
            start = time.perf_counter()
            step()
            if turn >= 2:
                times[name].append(time.perf_counter() - start)
    return [
        Row(
            name,
            statistics.median(times[name]) * 1e9 / parameters,
            statistics.median(a / b for a, b in zip(times[name], times[baseline], strict=True)),
            len(times[name]),
        )
        for name in steps
    ]
