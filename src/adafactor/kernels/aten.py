"""Adafactor in torch operations: any device, any strides, no question to the device.

The equation numbers are those of ``docs/algorithm.md``. Every statistic keeps its reduced axes as axes of length
1, so that rows, columns, stacks and batches of any order broadcast by themselves.

Large tensors are walked in blocks. On a CPU a block and its temporaries stay in cache, and on every device the
largest temporary is a block, not a parameter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, product

import torch
from torch import Tensor

from adafactor.factoring import Layout
from adafactor.kernels.aten_rounding import random_bits, row_major, stochastic_round
from adafactor.kernels.work import Work, math_dtype

Block = tuple[slice, ...]
ALL = slice(None)

# Elements per block. On a CPU a float32 block and two temporaries take 1.5 MB. On an accelerator a launch costs
# more than it saves, and the limit only keeps an embedding from needing its size again.
CPU_BLOCK = 1 << 17
DEVICE_BLOCK = 1 << 24


@dataclass(slots=True)
class Scalars:
    """Numbers that depend on t, as tensors of shape () on the parameter's device."""

    t: Tensor  # int64, this update counted from 1
    decay: Tensor  # 1 - beta(t), eq. 1
    rho: Tensor  # eq. 8
    shrink: Tensor  # 1 - lr * weight_decay


@dataclass(slots=True)
class Sums:
    """What ``measure`` found; all but ``rows`` add up over shards that split the rows of a matrix."""

    rows: Tensor | None  # the finished row statistic, eq. 2
    S: Tensor | None  # column sums of g², eq. 4
    W: Tensor  # column sums of g²/row, eq. 5; if unfactored the sum of u² itself, eq. 11
    Q: Tensor | None  # sum of x² per slice, eq. 6, where the parameter scale is asked for


def step(
    work: Sequence[Work], skipped: Tensor, combine: Callable[[Sequence[Work], Sequence[Sums]], None] | None = None
) -> None:
    """One update of every parameter in ``work``, all on one device.

    Args:
        work: the parameters; their ``param`` and ``state`` tensors are written in place.
        skipped: int64 of shape () on that device; receives the number of tensors left alone.
        combine: adds the sums over shards in place, for the whole list at once. Nothing to do on one device.
    """
    scalars = [s for run in _runs(work) for s in _scalars(run)]
    sums = [measure(w, s) for w, s in zip(work, scalars, strict=True)]
    if combine is not None:
        combine(work, sums)
    finite = [apply(w, s, found) for w, s, found in zip(work, scalars, sums, strict=True)]
    updated = torch.stack(finite).to(torch.int64)
    torch._foreach_add_([w.state["step"] for w in work], list(updated.unbind()))
    skipped.add_((1 - updated).sum())


def _runs(work: Sequence[Work]) -> Iterator[list[Work]]:
    """Neighbours that share settings, learning rate and dtype of arithmetic."""
    for _, run in groupby(work, lambda w: (id(w.settings), id(w.lr), math_dtype(w.param.dtype))):
        yield list(run)


def _scalars(run: Sequence[Work]) -> Iterator[Scalars]:
    """Equations 1 and 8, for a run of parameters at once: t may differ, and only the device knows it."""
    settings, lr, dtype = run[0].settings, run[0].lr, math_dtype(run[0].param.dtype)
    hp = settings.hyperparameters
    t = torch.stack([w.state["step"] for w in run]) + 1
    # float32 has integers up to 2**24 only; where there is no float64, a later t is rounded by 1 part in 2**24.
    exact = t.to(torch.float32 if t.device.type == "mps" else torch.float64)
    decay = exact**hp.beta_2_decay
    if hp.beta_2_max is not None:
        decay = decay.clamp(min=1.0 - hp.beta_2_max)
    if isinstance(lr, Tensor):
        lr = lr.detach().reshape(()).to(exact.device, exact.dtype, non_blocking=True)
    rate = torch.ones_like(exact) * lr
    rho = torch.minimum(rate, exact.rsqrt()) if hp.caps(scheduled=False) else rate
    shrink = 1.0 - rate * settings.weight_decay
    columns = (t, decay.to(dtype), rho.to(dtype), shrink.to(dtype))
    return map(Scalars, *(column.unbind() for column in columns))


def measure(w: Work, scalars: Scalars) -> Sums:
    """Read g and x once (eqs. 2 to 6, and 11 for an unfactored parameter). Nothing is written."""
    layout, hp, dtype = w.layout, w.settings.hyperparameters, math_dtype(w.param.dtype)
    decay, keep = scalars.decay, 1 - scalars.decay
    slices = _kept(layout, layout.whole)

    def zeros(shape: Sequence[int]) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=w.param.device)

    Q = zeros(slices) if hp.scale_parameter else None

    def add_squares(block: Block) -> None:
        if Q is not None:
            x = w.param[block].to(dtype)
            Q[_whole(block, layout.whole)] += _sum(x * x, layout.whole)  # eq. 6

    if not layout.factored:
        W = zeros(slices)
        for block, _ in _blocks(w):
            g = w.grad[block].to(dtype)
            q = g * g
            v = w.state["second_moment"][block] * keep + (q + hp.epsilon_1) * decay  # eq. 11
            W[_whole(block, layout.whole)] += _sum(q.div_(_divisor(v)), layout.whole)
            add_squares(block)
        return Sums(None, None, W, Q)

    old = w.state["row"].view(_kept(layout, layout.columns))
    rows = torch.empty_like(old)
    S, W = zeros(_kept(layout, layout.rows)), zeros(_kept(layout, layout.rows))
    for block, pieces in _blocks(w):
        band = _whole(block, layout.columns)
        squares: Tensor | None = None
        mean: Tensor | float = 0.0
        for piece in pieces:
            g = w.grad[piece].to(dtype)
            squares = g * g
            mean = mean + _sum(squares, layout.columns) / layout.m
        row = old[band] * keep + (mean + hp.epsilon_1) * decay  # eq. 2
        rows[band] = row
        divisor = _divisor(row)
        for piece in pieces:
            if len(pieces) > 1 or squares is None:
                g = w.grad[piece].to(dtype)
                squares = g * g
            columns = _whole(piece, layout.rows)
            S[columns] += _sum(squares, layout.rows)  # eq. 4
            W[columns] += _sum(squares.div_(divisor), layout.rows)  # eq. 5
            add_squares(piece)
    return Sums(rows, S, W, Q)


def apply(w: Work, scalars: Scalars, sums: Sums) -> Tensor:
    """Finish the statistics and move the parameter (eqs. 3 and 7 to 13).

    Returns:
        bool of shape (): whether the tensor was updated, or left alone because its gradient is not finite.
    """
    layout, settings, state = w.layout, w.settings, w.state
    hp, dtype = settings.hyperparameters, math_dtype(w.param.dtype)
    decay, keep = scalars.decay, 1 - scalars.decay
    if sums.rows is None or sums.S is None:
        finite = sums.W.sum().isfinite()
        sum_u2 = sums.W
    else:
        finite = (sums.W.sum() + sums.S.sum()).isfinite()
        row, old = state["row"].view_as(sums.rows), state["column"].view_as(sums.S)
        column = old * keep + (sums.S / layout.n + hp.epsilon_1) * decay  # eq. 3
        mu = column.mean(layout.columns, keepdim=True)
        sum_u2 = mu * _sum(sums.W / _divisor(column), layout.columns)  # eq. 7, per matrix
        sum_u2 = _sum(sum_u2, layout.whole)  # per slice
        inverse_row = _inverse_sqrt(sums.rows)
        inverse_column = mu.sqrt() * _inverse_sqrt(column)
    updated = finite if settings.skip_nonfinite else torch.ones_like(finite)
    left_alone = ~updated
    if sums.rows is not None:
        row.copy_(torch.where(updated, sums.rows, row))
        old.copy_(torch.where(updated, column, old))

    # Everything that scales û is a number per slice, so it costs nothing per element.
    scale = torch.ones_like(sum_u2)
    if hp.clip_threshold is not None:
        scale = scale / ((sum_u2 / layout.slice_size).sqrt() / hp.clip_threshold).clamp(min=1)  # eq. 10
    if settings.maximize:
        scale = -scale
    alpha = scalars.rho * torch.ones_like(sum_u2)
    if sums.Q is not None:
        alpha = alpha * (sums.Q / layout.slice_size).sqrt().clamp(min=hp.epsilon_2)  # eq. 9
    momentum = hp.momentum
    if momentum is None:
        scale = scale * alpha
    shrink = torch.where(updated, scalars.shrink, 1.0)

    for block, pieces in _blocks(w):
        for piece in pieces:
            slices = _whole(piece, layout.whole)
            g = w.grad[piece].to(dtype)
            if sums.rows is None:
                second_moment = state["second_moment"][piece]
                v = second_moment * keep + (g * g + hp.epsilon_1) * decay  # eq. 11
                u = (g * _inverse_sqrt(v)).mul_(scale[slices])
                second_moment.copy_(torch.where(updated, v, second_moment))
            else:
                u = g * inverse_row[_whole(block, layout.columns)]
                u.mul_(inverse_column[_whole(piece, layout.rows)] * scale[slices])
            if momentum is not None:
                stored = state["momentum"][piece]
                average = stored.to(dtype) * momentum + u.mul_(1 - momentum)  # eq. 12
                stored.copy_(torch.where(updated, average, stored))
                u = average.mul_(alpha[slices])
            if settings.skip_nonfinite:
                u.masked_fill_(left_alone, 0)
            _write(w, piece, u, shrink, scalars.t)  # eq. 13
    return updated


def _write(w: Work, piece: Block, update: Tensor, shrink: Tensor, t: Tensor) -> None:
    """x <- shrink x - update, rounded once."""
    x = w.param[piece]
    decays = bool(w.settings.weight_decay)
    if x.dtype == update.dtype:
        if decays:
            x.mul_(shrink)
        x.sub_(update)
        return
    exact = x.to(update.dtype)
    exact = (exact * shrink if decays else exact) - update
    if w.settings.stochastic_rounding:
        index = row_major(w.layout.shape, piece, x.device)
        exact = stochastic_round(exact, x.dtype, random_bits(w.settings.seed, t, w.tensor, index))
    x.copy_(exact)


def _blocks(w: Work) -> Iterator[tuple[Block, list[Block]]]:
    """Cut a parameter into blocks, and a block into pieces.

    A block holds whole rows, so that its part of the row statistic can be finished. It is one piece, unless a
    single row is larger than the limit: then the pieces cut the columns.
    """
    shape, columns = w.layout.shape, w.layout.columns
    limit = CPU_BLOCK if w.param.device.type == "cpu" else DEVICE_BLOCK
    strides = w.grad.stride()
    order = sorted(range(len(shape)), key=lambda axis: -strides[axis])  # keep neighbours in memory together
    chunk, size = list(shape), w.layout.size
    for axis in [axis for axis in order if axis not in columns]:
        size = _cut(chunk, axis, size, limit)
    for block in _slices(shape, chunk, (ALL,) * len(shape)):
        for axis in [axis for axis in order if axis in columns]:
            size = _cut(chunk, axis, size, limit)
        inner = [n if axis in columns else shape[axis] for axis, n in enumerate(chunk)]
        yield block, list(_slices(shape, inner, block))


def _cut(chunk: list[int], axis: int, size: int, limit: int) -> int:
    """Shorten one axis of a block until the block holds at most ``limit`` elements; return how many it holds."""
    if size <= limit:
        return size
    rest = size // chunk[axis]
    chunk[axis] = max(1, limit // rest)
    return rest * chunk[axis]


def _slices(shape: Sequence[int], chunk: Sequence[int], outer: Block) -> Iterator[Block]:
    axes = (
        [slice(i, min(i + c, n)) for i in range(0, n, c)] if c < n else [outside]
        for n, c, outside in zip(shape, chunk, outer, strict=True)
    )
    return product(*axes)


def _whole(block: Block, axes: Sequence[int]) -> Block:
    """The block's place in a statistic that has ``axes`` reduced to length 1."""
    return tuple(ALL if axis in axes else part for axis, part in enumerate(block))


def _kept(layout: Layout, axes: Sequence[int]) -> tuple[int, ...]:
    """The parameter's shape with ``axes`` reduced to length 1."""
    return tuple(1 if axis in axes else n for axis, n in enumerate(layout.shape))


def _sum(x: Tensor, axes: Sequence[int]) -> Tensor:
    return x.sum(tuple(axes), keepdim=True) if axes else x  # torch reads no axes as all of them


def _divisor(v: Tensor) -> Tensor:
    """v, or 1 where it is 0: where a statistic is 0 so was every gradient behind it, and 0/0 is 0."""
    return torch.where(v == 0, 1, v)


def _inverse_sqrt(v: Tensor) -> Tensor:
    """v^(-1/2), or 0 where v is 0."""
    return torch.where(v == 0, 0, v.rsqrt())
