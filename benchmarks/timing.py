"""Timing that holds on a shared machine: candidates take turns, and ratios are taken turn by turn."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """One candidate's step time: median in nanoseconds per parameter, and the median ratio to the baseline."""

    name: str
    ns_per_parameter: float
    ratio: float

    def __str__(self) -> str:
        return f"{self.name:<44} {self.ns_per_parameter:9.2f} {self.ratio:9.2f}"


HEADER = f"{'':<44} {'ns/param':>9} {'ratio':>9}"


def interleave(
    steps: Mapping[str, Callable[[], object]], parameters: int, repeats: int = 15, baseline: str | None = None
) -> list[Row]:
    """Run every step in turn, ``repeats`` times after a warm-up of two, and compare to the baseline (the first).

    Each callable must return only when its work is done. In its turn it runs twice, and the second run counts: the
    first pays for what the one before has left to the system, such as 128 MB of temporaries to give back.
    """
    baseline = baseline or next(iter(steps))
    times: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(repeats + 2):
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
        )
        for name in steps
    ]
