"""The exact step of parameters of which this process holds parts: measure, reduce, finish, apply.

Every part is a tensor of its own to a backend, with the divisors of the whole (`factoring.Part`). What its sums lack
lies on other processes, and is packed for all parameters into one buffer a round (`reducer.py`). Nothing is written
before the last sum.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from adafactor.engine.torch.blocks import total
from adafactor.engine.torch.checks import Witness
from adafactor.engine.torch.choose import Plan
from adafactor.engine.torch.sharded.held import Sharded
from adafactor.engine.torch.sharded.reducer import reducers


class ShardedStep:
    """What updates a list of DTensors and flat parameters, on all ranks the same in the same order.

    Args:
        state: the optimizer's.

    Attributes:
        params: what is here of every one; ``at``: its place in the list of gradients.
        plan: of all their parts.
    """

    def __init__(
        self,
        params: Sequence[Sharded],
        at: Sequence[int],
        grads: Sequence[Tensor | None],
        state: Mapping[Tensor, dict[str, Any]],
    ) -> None:
        self.params, self.at = params, at
        self._kept = {number for number, its in enumerate(params) if state.get(its.draft.param)}  # with state before
        self.plan = Plan([w for its in params for w in its.works], self._cut(grads))
        self.reducers = reducers(params)
        self._witness = Witness(params)
        self._summed = [its.summed for its in params]
        cuts = [held.placement.cut for its in params for held in its.tensors for _ in held.works]
        self._stacks, self._both = ({k for k, cut in enumerate(cuts) if cut == kind} for kind in ("stack", "both"))
        # Of a tensor's parts the first has its number of updates, and the others have copies, which do not count.
        self._copies: list[tuple[Tensor, Tensor]] = []
        self._steps: dict[int, Tensor] = {}
        first = 0
        for works in (held.works for its in params for held in its.tensors if held.works):
            self._steps[first], *copies = (w.state["step"] for w in works)
            self._copies += [(copy, self._steps[first]) for copy in copies]
            first += len(works)

    def current(self, grads: Sequence[Tensor | None], state: Mapping[Tensor, dict[str, Any]], dense: bool) -> bool:
        """Whether nothing has moved; ``dense``: and all gradients are there in the order of memory."""
        if self._summed != [its.summed for its in self.params] or self._witness.moved():
            return False
        for number, its in enumerate(self.params):
            kept = state.get(its.draft.param, {})
            if not its.current(kept) or (number in self._kept and not kept):
                return False
        here = [grad for k in self.at if (grad := grads[k]) is not None]
        return not dense or (len(here) == len(self.at) and self._witness.fits(here))

    def _cut(self, grads: Sequence[Tensor | None]) -> list[Tensor]:
        return [part for its, k in zip(self.params, self.at, strict=True) for part in its.cut(grads[k])]

    def check(self) -> None:
        """`Plan.check`, of what the state says now."""
        for copy, step in self._copies:
            copy.copy_(step)
        self.plan.check()

    def step(
        self,
        grads: Sequence[Tensor | None],
        state: Mapping[Tensor, dict[str, Any]],
        skipped: Callable[[torch.device], Tensor],
    ) -> None:
        """One update, after `check`, of every tensor that has a gradient on any rank; others are left alone."""
        plan, work = self.plan, self.plan.work
        present = [grads[k] is not None for k in self.at]
        before = {k: step.clone() for k, step in self._steps.items()} if self._copies else {}
        try:
            sums = plan.measure(self._cut(grads))
            plan.finish_columns(self._stacks)
            for k in self._stacks:
                its, layout = sums[k], work[k].layout
                if its.columns is not None and its.weighted is not None:  # of an unfactored one W is Σu² already
                    its.u2 = total(its.columns / layout.m * its.weighted, layout.whole)
            gone = [member for reducer in self.reducers for member in reducer.first(sums, present)]
            plan.measure_again()
            plan.finish_columns(self._both)
            for reducer in self.reducers:
                if reducer.second is not None:
                    reducer.second(work, sums)
            left_out = {k for member in gone for k in member.works}
            recorded = [w.diagnostics for k, w in enumerate(work) if k in left_out and w.diagnostics is not None]
            last = [each.clone() for each in recorded]
            plan.apply(_uncounted if before else skipped, left_out)
            for each, value in zip(recorded, last, strict=True):  # finish has recorded an update by zeros
                each.copy_(value)
        finally:
            plan.release()
        for k in before.keys() - left_out:
            step = self._steps[k]
            skipped(step.device).add_((step == before[k]).to(torch.int64))
        gone_of = Counter(member.number for member in gone)
        for number, sharded in enumerate(self.params):
            if sharded.draft.param.numel() and gone_of[number] < len(sharded.tensors):
                state[sharded.draft.param].update(sharded.kept)
                self._kept.add(number)


def _uncounted(device: torch.device) -> Tensor:
    return torch.zeros((), dtype=torch.int64, device=device)
