"""One update of a parameter group as one operator, for ``torch.compile``.

The compiler sees which tensors are read and which are written, and does not look inside: kernels that torch
cannot trace, and kernels that need not be fused again, run the same compiled or not.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count
from typing import Protocol
from weakref import WeakValueDictionary

import torch
from torch import Tensor


class Steps(Protocol):
    """What the operator asks of an optimizer."""

    def _run_group(
        self, number: int, params: Sequence[Tensor], grads: Sequence[Tensor], state: Sequence[Tensor]
    ) -> None: ...


_optimizers: WeakValueDictionary[int, Steps] = WeakValueDictionary()
_handles = count()


def register(optimizer: Steps) -> int:
    """A number by which compiled code, which holds no objects, finds an optimizer again."""
    handle = next(_handles)
    _optimizers[handle] = optimizer
    return handle


@torch.library.custom_op("adafactor::step", mutates_args=("params", "state"))
def step(
    optimizer: int, group: int, params: Sequence[Tensor], grads: Sequence[Tensor], state: Sequence[Tensor]
) -> None:
    """Update ``params`` and ``state``, the tensors of group number ``group`` that have a gradient, in place."""
    _optimizers[optimizer]._run_group(group, params, grads, state)
