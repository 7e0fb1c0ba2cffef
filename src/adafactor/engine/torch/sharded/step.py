"""The exact step of sharded parameters: measure, reduce, finish, apply.

A process sees its part of every DTensor parameter as a tensor of its own, with the divisors of the whole
(`factoring.Part`). What its sums lack lies on other processes: mostly column sums, packed for all parameters into one
buffer and one all-reduce (`reducer.py`). Nothing is written before the last sum.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from adafactor.engine.torch.blocks import total
from adafactor.engine.torch.choose import Plan
from adafactor.engine.torch.sharded.rank_check import summed
from adafactor.engine.torch.sharded.reducer import Reducer
from adafactor.engine.torch.sharded.shard import Shard, absent


class ShardStep:
    """What updates a list of DTensors, on all ranks the same in the same order.

    Attributes:
        shards: what is here of every one; ``at``: its place in the list of gradients.
        plan: of the local parts.
    """

    def __init__(
        self, shards: Sequence[Shard], at: Sequence[int], grads: Sequence[Tensor | None], reducers: Sequence[Reducer]
    ) -> None:
        self.shards, self.at, self._reducers = shards, at, reducers
        self.plan = Plan([shard.work for shard in shards], self._filled(grads))
        self._summed = summed(self.plan.work)

    def current(self, grads: Sequence[Tensor | None], state: Mapping[Tensor, dict[str, Any]], dense: bool) -> bool:
        """Whether nothing has moved; ``dense``: and all gradients are there in the order of memory."""
        if self._summed != summed(self.plan.work) or self.plan.witness.moved():
            return False
        if not all(shard.current(state.get(shard.param, {})) for shard in self.shards):
            return False
        here = [grad for k in self.at if (grad := grads[k]) is not None]
        return not dense or (len(here) == len(self.at) and self.plan.witness.fits(here))

    def _filled(self, grads: Sequence[Tensor | None]) -> list[Tensor]:
        """A gradient for every part."""
        pairs = zip(self.shards, self.at, strict=True)
        return [absent(shard.work.param) if (grad := grads[k]) is None else grad for shard, k in pairs]

    def check(self) -> None:
        self.plan.check()

    def step(
        self,
        grads: Sequence[Tensor | None],
        state: Mapping[Tensor, dict[str, Any]],
        skipped: Callable[[torch.device], Tensor],
    ) -> None:
        """One update, after `check`, of every parameter that has a gradient on any rank; others are left alone."""
        plan = self.plan
        present = [grads[k] is not None for k in self.at]
        try:
            sums = plan.measure(self._filled(grads))
            plan.finish_columns("stack")
            for w, its in zip(plan.work, sums, strict=True):
                if its.columns is not None and its.weighted is not None:
                    its.u2 = total(its.columns / w.layout.m * its.weighted, w.layout.whole)  # of the matrices here
            nowhere = {place for reducer in self._reducers for place in reducer.first(plan.work, sums, present)}
            plan.measure_again()
            plan.finish_columns("both")
            for reducer in self._reducers:
                reducer.second(sums)
            plan.apply(skipped, nowhere)
        finally:
            plan.release()
        for k, shard in enumerate(self.shards):
            if k not in nowhere:
                state[shard.param].update(shard.state)
