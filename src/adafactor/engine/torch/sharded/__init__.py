"""Parameters of which a process holds parts: where they lie, and the all-reduces that complete their sums."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor
from torch.nn import Parameter

from adafactor.core.errors import message
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


def check_origin(param: Tensor, given: Sequence[weakref.ref[Tensor]]) -> None:
    """Refuse flat pieces of which nobody records what they hold.

    The parameters that the user has ``given`` tell: ZeRO ties what it partitions to its partition.
    """
    if param.dim() != 1:  # NO_SHARD leaves the others whole
        return
    rule = "a tensor with the rows and columns of its layer"
    if is_flat(param):
        remedy = "Use fully_shard (FSDP2), or a FullyShardedDataParallel of contiguous parameters that is there."
        got = f"a flat shard of FSDP1 with shape {tuple(param.shape)}"
        raise RuntimeError(message("a parameter", rule, got, remedy))
    known = [that for ref in given if (that := ref()) is not None] if "deepspeed" in sys.modules else []
    if any(that is param for that in known):
        return
    if any(hasattr(that, name) for that in known for name in ("_hp_mapping", "ds_id")):
        remedy = "Use ZeRO stage 1, 2 or 3, or fully_shard (FSDP2); docs/sharding.md shows how."
        got = f"a flat partition of DeepSpeed ZeRO with shape {tuple(param.shape)}"
        raise RuntimeError(message("a parameter", rule, got, remedy))
