"""The step as ``torch.compile`` sees it: one operator per parameter group.

The compiler sees which tensors are read and which are written, and does not look inside: kernels that torch
cannot trace, and kernels that need not be fused again, run the same compiled or not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import count
from typing import Any, Protocol
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from adafactor.core.errors import message
from adafactor.engine.torch.choose import Plan
from adafactor.engine.torch.sharded import spans_of
from adafactor.engine.torch.work import is_sharded
from adafactor.torch.members import Chosen
from adafactor.torch.prepare import Preparation, Prepared


class Stepped(Protocol):
    """What an optimizer is here."""

    param_groups: list[dict[str, Any]]
    _handle: int
    _preparation: Preparation

    def _init_group(
        self, group: dict[str, Any], params: list[Tensor], grads: list[Tensor], state: list[Tensor]
    ) -> bool: ...
    def _prepared(self, chosen: Chosen) -> Prepared: ...
    def _count_of(self, device: torch.device) -> Tensor: ...


_optimizers: WeakValueDictionary[int, Stepped] = WeakValueDictionary()
_handles = count()


def register(optimizer: Stepped) -> int:
    """A number by which compiled code, which holds no objects, finds an optimizer again."""
    handle = next(_handles)
    _optimizers[handle] = optimizer
    return handle


def traced_step(optimizer: Stepped) -> None:
    """What ``step`` does while the compiler traces it."""
    number = 0
    for group in optimizer.param_groups:
        params: list[Tensor] = []
        grads: list[Tensor] = []
        state: list[Tensor] = []
        optimizer._init_group(group, params, grads, state)
        if params:
            torch.ops.adafactor.step(optimizer._handle, number, params, grads, state)
        number += 1  # noqa: SIM113 - the compiler must see that group comes from param_groups


def list_tensors(
    optimizer: Stepped, group: dict[str, Any], params: list[Tensor], grads: list[Tensor], state: list[Tensor]
) -> None:
    """List the tensors that the operator is to have of a group.

    Raises:
        RuntimeError: one is sharded, whose step asks other ranks.
    """
    if any(is_sharded(param) or spans_of(param) is not None for param in group["params"]):
        remedy = "Compile the model, and call step outside of what is compiled."
        raise RuntimeError(message("a parameter in a compiled step", "an unsharded tensor", "a shard", remedy))
    plan, present = _plan_of(optimizer, next(k for k, other in enumerate(optimizer.param_groups) if other is group))
    for w, grad in zip(plan.work if plan else (), present, strict=True):
        params.append(w.param)
        grads.append(grad)
        state.extend(w.state[name] for name in w.slots)


def _plan_of(optimizer: Stepped, number: int) -> tuple[Plan | None, Sequence[Tensor]]:
    """What updates a group, and its gradients."""
    chosen = optimizer._preparation.collect(optimizer.param_groups, [(number, None)])
    if not chosen.params:
        return None, []
    prepared = optimizer._prepared(chosen)
    return prepared.plan, prepared.grads(chosen.grads)


@torch.library.custom_op("adafactor::step", mutates_args=("params", "state"))
def step(
    optimizer: int, group: int, params: Sequence[Tensor], grads: Sequence[Tensor], state: Sequence[Tensor]
) -> None:
    """Update ``params`` and ``state``, the tensors of group number ``group`` that have a gradient, in place.

    What compiled code passes need not be the parameters themselves.
    """
    stepped = _optimizers[optimizer]
    plan, _ = _plan_of(stepped, group)
    assert plan is not None
    rest = iter(state)
    passed = [
        replace(w, param=param, state={name: next(rest) for name in w.slots})
        for w, param in zip(plan.work, params, strict=True)
    ]
    own = [tensor.data_ptr() for w in plan.work for tensor in (w.param, *(w.state[name] for name in w.slots))]
    theirs = [tensor.data_ptr() for w in passed for tensor in (w.param, *w.state.values())]
    if own != theirs or not all(grad.is_contiguous() for grad in grads):
        plan = Plan(passed, grads)
    plan.step(grads, stepped._count_of)
