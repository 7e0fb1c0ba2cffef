"""Combine: which axis is split over which devices, and the all-reduce that completes the sums (docs/algorithm.md)."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from torch import Tensor
from torch.nn import Parameter

from adafactor.engine.torch.checks import is_flat
from adafactor.engine.torch.work import is_sharded

if TYPE_CHECKING:
    from adafactor.engine.torch.sharded.flat import Spans

_ORIGINS = f"{__name__}.origins"


def spans_of(param: Tensor) -> Spans | None:
    """What a flat parameter holds, or ``None``. Whoever can tell is imported only where there may be one."""
    if param.dim() != 1 or is_sharded(param):
        return None
    if not (is_flat(param) or _ORIGINS in sys.modules or ("deepspeed" in sys.modules and type(param) is not Parameter)):
        return None
    from adafactor.engine.torch.sharded import origins

    return origins.spans_of(param)
