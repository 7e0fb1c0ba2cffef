"""Where a flat parameter comes from: the tensors in it and what every process holds of them, as its engine records it.

FSDP1's parameters do not know their flat parameter, and ZeRO's partitions do not know their optimizer. Both are looked
for once, among the objects of the process.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import accumulate
from math import prod
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.nn import Parameter
from torch.utils.weak import WeakIdKeyDictionary

from adafactor.core.errors import message
from adafactor.core.factoring import Shape
from adafactor.core.intervals import Interval, cuts
from adafactor.engine.torch.checks import is_flat
from adafactor.engine.torch.sharded.flat import Span, Spans

_known: Any = WeakIdKeyDictionary()
ZERO = ("DeepSpeedZeroOptimizer", "DeepSpeedZeroOptimizer_Stage3", "BF16_Optimizer")


def record(param: Tensor, spans: Spans) -> None:
    """Say what a parameter holds, in the place of an engine."""
    _known[param] = spans


def spans_of(param: Tensor) -> Spans | None:
    """What a flat parameter holds, or ``None`` where nobody records it."""
    if param not in _known:
        if is_flat(param):
            for handle in _objects("torch.distributed.fsdp._flat_param", ("FlatParamHandle",)):
                _known.update(_of_fsdp(handle))
        elif type(param) is not Parameter:
            for optimizer in _objects("deepspeed", ZERO):
                _known.update(_of_stage_3(optimizer) if hasattr(optimizer, "fp16_groups") else _of_zero(optimizer))
    spans: Spans | None = _known.get(param)
    return spans


def _objects(module: str, names: Sequence[str]) -> list[Any]:
    if module not in sys.modules:
        return []
    return [
        each for each in gc.get_objects() if type(each).__name__ in names and type(each).__module__.startswith(module)
    ]


def _of_fsdp(handle: Any) -> Iterator[tuple[Tensor, Spans]]:
    """A ``FlatParamHandle``'s flat parameter, or the pieces of parameters that ``use_orig_params=True`` shows of it."""
    flat = handle.flat_param
    if not all(flat._contiguities) or any(extension is not None for extension in flat._param_extensions):
        return  # in another order than rows and columns, or shards of tensor parallelism already
    ends = accumulate(flat._numels_with_padding, initial=0)
    first = [at for at, padding in zip(ends, flat._is_padding_mask, strict=False) if not padding]
    tensors = list(zip(flat._fqns, map(tuple, flat._shapes), first, strict=True))
    if handle.uses_sharded_strategy:
        group = handle.process_group
        spans = _of_buffer(tensors, flat._sharded_size.numel(), handle.world_size, handle.rank)
    else:
        group, spans = None, _of_buffer(tensors, first[-1] + flat._numels[-1], 1, 0)
    if flat._params is None:
        yield flat, Spans(spans, group)
    else:
        for param, span in zip(flat._params, spans, strict=True):
            yield param, Spans((replace(span, at=0),), group)


def _of_zero(optimizer: Any) -> Iterator[tuple[Tensor, Spans]]:
    """Stages 1 and 2 flatten a group's parameters into one buffer and cut it into equal partitions."""
    if getattr(optimizer, "elastic_checkpoint", False):  # it takes padding off every tensor of the state
        remedy = "Leave it out: an ordinary checkpoint of ZeRO holds the statistics of whole tensors."
        raise RuntimeError(message("elastic_checkpoint of DeepSpeed's ZeRO", "false for Adafactor", True, remedy))
    bf16 = hasattr(optimizer, "fp32_groups_flat_partition")
    partitions = optimizer.fp32_groups_flat_partition if bf16 else optimizer.single_partition_of_fp32_groups
    listed = optimizer.bf16_groups if bf16 else optimizer.round_robin_bit16_groups
    padded = None if bf16 else getattr(optimizer, "round_robin_bit16_offsets", None)
    for k, (partition, params, group) in enumerate(
        zip(partitions, listed, optimizer.real_dp_process_group, strict=True)
    ):
        first = padded[k] if padded else accumulate((param.numel() for param in params), initial=0)
        tensors = [
            (name, tuple(param.shape), at)
            for name, param, at in zip(_names(optimizer, params), params, first, strict=False)
        ]
        spans = _of_buffer(tensors, partition.numel(), dist.get_world_size(group), dist.get_rank(group))
        yield partition, Spans(spans, group)


def _of_stage_3(optimizer: Any) -> Iterator[tuple[Tensor, Spans]]:
    """Stage 3 cuts every parameter into equal partitions, and concatenates those of a sub-group."""
    group = optimizer.dp_process_group
    world = dist.get_world_size(group)
    for partition, params in zip(optimizer.fp32_partitioned_groups_flat, optimizer.fp16_groups, strict=True):
        sizes = [param.partition_numel() for param in params]
        first = accumulate(sizes, initial=0)
        spans = [
            Span(name, tuple(param.ds_shape), cuts(0, param.ds_numel, pieces(size, world)), at)
            for name, param, size, at in zip(_names(optimizer, params), params, sizes, first, strict=False)
        ]
        yield partition, Spans(tuple(spans), group)


def _names(optimizer: Any, params: Sequence[Any]) -> list[str]:
    names = getattr(optimizer, "param_names", {})
    return [str(names.get(param, f"tensor {k}")) for k, param in enumerate(params)]


def pieces(size: int, world: int) -> list[Interval]:
    """Equal pieces of a buffer."""
    return [(rank * size, (rank + 1) * size) for rank in range(world)]


def _of_buffer(tensors: Sequence[tuple[str, Shape, int]], size: int, world: int, rank: int) -> tuple[Span, ...]:
    """Tensors, each with its place in a buffer, of which every process has an equal piece."""
    return tuple(
        Span(name, shape, cuts(at, prod(shape), pieces(size, world)), max(0, at - rank * size))
        for name, shape, at in tensors
    )
