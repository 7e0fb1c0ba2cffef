"""Blocks of a parameter: small enough to stay in cache, whole enough to finish row statistics."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product

from torch import Tensor

from adafactor.core.factoring import Layout
from adafactor.engine.torch import int8
from adafactor.engine.torch.work import Work

# One slice per axis; None is the whole tensor, which most tensors fit in and which costs no indexing.
Block = tuple[slice, ...] | None

ALL = slice(None)
# Elements per block. On a CPU a float32 block takes 1 MB; smaller ones cost more starts of parallel loops than
# they save. On an accelerator the limit only keeps an embedding from needing its own size again.
CPU_BLOCK = 1 << 18
DEVICE_BLOCK = 1 << 22


def blocks(w: Work, grad: Tensor) -> Iterator[tuple[Block, list[Block]]]:
    """Cut a parameter into blocks, and a block into pieces.

    A block holds whole rows, so that its part of the row statistic can be finished. It is one piece, unless a
    single row is larger than the limit: then the pieces cut the columns.
    """
    shape, columns, size = w.layout.shape, w.layout.columns, w.layout.size
    limit = _limit(w)
    if size <= limit:
        yield None, [None]
        return
    strides = grad.stride()
    order = sorted(range(len(shape)), key=lambda axis: -strides[axis])  # neighbours in memory stay together
    chunk = list(shape)
    for axis in [axis for axis in order if axis not in columns]:
        size = _cut(chunk, axis, size, limit)
    outer = list(chunk)
    for axis in [axis for axis in order if axis in columns]:
        size = _cut(chunk, axis, size, limit)
    inner = [n if axis in columns else shape[axis] for axis, n in enumerate(chunk)]
    for block in _slices(shape, outer, (ALL,) * len(shape)):
        yield block, list(_slices(shape, inner, block))


def coded_blocks(w: Work) -> Iterator[tuple[Block, list[Block]]]:
    """The same for a parameter whose momentum is 8-bit: its blocks of 256 elements are cut nowhere."""
    limit = _limit(w)
    if w.layout.size <= limit:
        yield None, [None]
        return
    for slab in int8.slabs(w.layout.shape, limit):
        yield slab, [slab]


def _limit(w: Work) -> int:
    return CPU_BLOCK if w.param.device.type == "cpu" else DEVICE_BLOCK


def _cut(chunk: list[int], axis: int, size: int, limit: int) -> int:
    """Shorten one axis of a block until the block holds at most ``limit`` elements; return how many it holds."""
    if size <= limit:
        return size
    rest = size // chunk[axis]
    chunk[axis] = max(1, limit // rest)
    return rest * chunk[axis]


def _slices(shape: Sequence[int], chunk: Sequence[int], outside: tuple[slice, ...]) -> Iterator[tuple[slice, ...]]:
    """All blocks of at most ``chunk``; an axis that is not cut keeps its slice of ``outside``."""
    axes = (
        [slice(i, min(i + c, n)) for i in range(0, n, c)] if c < n else [whole]
        for n, c, whole in zip(shape, chunk, outside, strict=True)
    )
    return product(*axes)


def at(tensor: Tensor, block: Block) -> Tensor:
    """The block of a tensor, as a view."""
    return tensor if block is None else tensor[block]


def reduced(block: Block, axes: Sequence[int]) -> Block:
    """The block's place in a statistic that has ``axes`` reduced to length 1."""
    return None if block is None else tuple(ALL if axis in axes else part for axis, part in enumerate(block))


def kept(layout: Layout, axes: Sequence[int]) -> tuple[int, ...]:
    """The parameter's shape with ``axes`` reduced to length 1."""
    return tuple(1 if axis in axes else n for axis, n in enumerate(layout.shape))


def total(x: Tensor, axes: Sequence[int]) -> Tensor:
    """The sum over ``axes``, which stay with length 1; torch's own ``sum`` reads no axes as all of them."""
    return x.sum(tuple(axes), keepdim=True) if axes else x
