"""The exact step of sharded parameters: measure, reduce, finish, apply.

A process sees its part of every DTensor parameter as a tensor of its own, with the divisors of the whole
(`factoring.Part`). What its sums lack lies on other processes: mostly column sums, packed for all parameters into one
buffer and one all-reduce (`reducer.py`). Nothing is written before the last sum.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from adafactor.engine.torch.blocks import total
from adafactor.engine.torch.choose import Plan
from adafactor.engine.torch.sharded.reducer import Reducer
from adafactor.engine.torch.work import Sums


def step(
    plan: Plan,
    grads: Sequence[Tensor],
    present: Sequence[bool],
    reducers: Sequence[Reducer],
    skipped: Callable[[torch.device], Tensor],
) -> set[int]:
    """One update of every parameter that has a gradient on any rank.

    Args:
        plan: of the local parts, on all ranks of the same parameters in the same order.
        grads: of each, of its local shape.
        present: whether it is one; elsewhere it may be.

    Returns:
        The places of those that have no gradient anywhere, which were left as they are.
    """
    try:
        sums: list[Sums | None] = [None] * len(plan.work)
        for backend, places in plan.backends:
            for place, its in zip(places, backend.measure([grads[k] for k in places]), strict=True):
                sums[place] = its
        complete = [its for its in sums if its is not None]
        _finish_columns(plan, "stack")
        for w, its in zip(plan.work, complete, strict=True):
            if its.columns is not None and its.weighted is not None:
                its.u2 = total(its.columns / w.layout.m * its.weighted, w.layout.whole)  # of the matrices that are here
        absent = {place for reducer in reducers for place in reducer.first(plan.work, complete, present)}
        for backend, _ in plan.backends:
            backend.measure_again()
        _finish_columns(plan, "both")
        for reducer in reducers:
            reducer.second(complete)
        for backend, places in plan.backends:
            backend.finish()
            gone = [k for k, place in enumerate(places) if place in absent]
            backend.apply(skipped(plan.work[places[0]].param.device), gone)
        return absent
    finally:
        plan.release()


def _finish_columns(plan: Plan, cut: str) -> None:
    for backend, places in plan.backends:
        backend.finish_columns([k for k, place in enumerate(places) if plan.work[place].layout.cut == cut])
