"""Adafactor in torch operations: any device, any strides, no question to the device.

The equation numbers are those of ``docs/algorithm.md``. Every statistic keeps its reduced axes as axes of length
1, so that rows, columns, stacks and batches of any order broadcast by themselves.

Large tensors are walked in blocks (`aten_blocks.py`), so the largest temporary is a block, not a parameter. What
is one number per tensor is computed for a whole run of tensors at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from adafactor.engine.torch import int8
from adafactor.engine.torch.blocks import Block, at, blocks, coded_blocks, kept, reduced, total
from adafactor.engine.torch.rounding import random_bits, row_major, stochastic_round
from adafactor.engine.torch.work import Settings, Work, math_dtype


@dataclass(slots=True)
class Run:
    """Neighbours in the list that share settings, learning rate and dtype, and their scalars, of shape () each."""

    work: Sequence[Work]
    settings: Settings
    dtype: torch.dtype
    t: Sequence[Tensor]  # int64, this update counted from 1
    decay: Sequence[Tensor]  # 1 - beta(t), eq. 1
    rho: Sequence[Tensor]  # eq. 8
    shrink: Sequence[Tensor]  # 1 - lr * weight_decay


@dataclass(slots=True)
class Sums:
    """What ``measure`` found; all but ``rows`` add up over shards that split the rows of a matrix."""

    rows: Tensor | None  # the finished row statistic, eq. 2
    S: Tensor | None  # column sums of g², eq. 4
    W: Tensor  # column sums of g²/row, eq. 5; if unfactored the sum of u² itself, eq. 11
    Q: Tensor | None  # sum of x² per slice, eq. 6, where the parameter scale is asked for
    mu: Tensor | None = None  # mean of the columns per matrix, where this device does not hold them all
    spoilt: Tensor | None = None  # NaN where a gradient on another device is not finite: this part may be empty
    sum_u2: Tensor | None = None  # eq. 7 per slice, where the sums here do not give it


@dataclass(slots=True)
class Columns:
    """The finished column statistic and what the columns of u are multiplied by."""

    column: Tensor  # eq. 3
    factor: Tensor  # sqrt(mu) column^(-1/2), eq. 13


@dataclass(slots=True)
class Move:
    """How far one tensor moves. ``scale`` and ``alpha`` have shape (), or keep the batch axes."""

    scale: Tensor  # of the normalised update: clipping and sign, and alpha too where no momentum comes between
    alpha: Tensor  # eq. 9
    shrink: Tensor
    updated: Tensor  # bool: False leaves parameter and state alone
    decay: Tensor
    t: Tensor


def step(work: Sequence[Work], skipped: Tensor) -> None:
    """One update of every parameter in ``work``, all on one device; `sharding/torch.py` puts a sum in between.

    Args:
        work: the parameters; their ``param`` and ``state`` tensors are written in place.
        skipped: int64 of shape () on that device; receives the number of tensors left alone.
    """
    groups = list(runs(work))
    sums = [measure(w, decay) for run in groups for w, decay in zip(run.work, run.decay, strict=True)]
    found = iter(sums)
    for run in groups:
        apply(run, [next(found) for _ in run.work], skipped)


def runs(work: Sequence[Work]) -> Iterator[Run]:
    """Equations 1 and 8, for a run of parameters at once: t may differ, and only the device knows it."""
    for _, members in groupby(work, lambda w: (id(w.settings), id(w.lr), math_dtype(w.param.dtype))):
        run = list(members)
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
        rho = torch.minimum(rate, exact.rsqrt()) if hp.caps(settings.scheduled) else rate
        shrink = 1.0 - rate * settings.weight_decay
        scalars = [values.to(dtype).unbind() for values in (decay, rho, shrink)]
        yield Run(run, settings, dtype, t.unbind(), *scalars)


def measure(w: Work, decay: Tensor) -> Sums:
    """Read g and x once (eqs. 2 to 6, and 11 for an unfactored parameter). Nothing is written."""
    layout, hp, dtype = w.layout, w.settings.hyperparameters, math_dtype(w.param.dtype)
    # Sums over the rows of a block and over whole slices; blocks add up, and the first one is the sum so far.
    S: Tensor | None = None
    W: Tensor | None = None
    Q: Tensor | None = None

    def add(sums: Tensor | None, values: Tensor, block: Block, axes: Sequence[int]) -> Tensor:
        values = total(values, axes)
        if block is None:
            return values
        if sums is None:
            sums = torch.zeros(kept(layout, axes), dtype=dtype, device=values.device)
        at(sums, reduced(block, axes)).add_(values)
        return sums

    def squares(tensor: Tensor, block: Block) -> Tensor:
        x = at(tensor, block).to(dtype)
        return x * x

    if not layout.factored:
        for block, _ in blocks(w):
            q = squares(w.grad, block)
            v = torch.lerp(at(w.state["second_moment"], block), q + hp.epsilon_1, decay)  # eq. 11
            W = add(W, q.div_(positive(v)), block, layout.whole)
            if hp.scale_parameter:
                Q = add(Q, squares(w.param, block), block, layout.whole)  # eq. 6
        return Sums(None, None, _found(W), Q)

    old = w.state["row"].view(kept(layout, layout.columns))
    rows: Tensor | None = None
    for block, pieces in blocks(w):
        band = reduced(block, layout.columns)
        sums: Tensor | None = None
        squared: Tensor | None = None
        for piece in pieces:
            squared = squares(w.grad, piece)
            part = total(squared, layout.columns)
            sums = part if sums is None else sums + part
        row = torch.lerp(at(old, band), _found(sums) / layout.m + hp.epsilon_1, decay)  # eq. 2
        if block is None:
            rows = row
        else:
            rows = torch.empty_like(old) if rows is None else rows
            at(rows, band).copy_(row)
        inverse = positive(row).rsqrt_()
        for piece in pieces:
            g2 = squares(w.grad, piece) if squared is None or len(pieces) > 1 else squared
            S = add(S, g2, piece, layout.rows)  # eq. 4
            # Divided before it is squared: g² alone is 0 below 1e-23, where u can still be large.
            torch.mul(at(w.grad, piece), inverse, out=g2)
            W = add(W, g2.square_(), piece, layout.rows)  # eq. 5
            if hp.scale_parameter:
                Q = add(Q, squares(w.param, piece), piece, layout.whole)
    return Sums(rows, S, _found(W), Q)


def apply(run: Run, sums: Sequence[Sums], skipped: Tensor) -> None:
    """Finish the statistics and move the parameters of a run (eqs. 3 and 7 to 13)."""
    hp = run.settings.hyperparameters
    columns: list[Columns | None] = []
    sums_u2, checks = [], []
    for w, found, decay in zip(run.work, sums, run.decay, strict=True):
        layout = w.layout
        sum_u2 = found.W
        if found.S is None:
            columns.append(None)
            checks.append(sum_u2.sum())
        else:
            column = torch.lerp(w.state["column"].view_as(found.S), found.S / layout.n + hp.epsilon_1, decay)  # eq. 3
            mu = column.mean(layout.columns, keepdim=True) if found.mu is None else found.mu
            above_zero = positive(column)
            if found.sum_u2 is None:
                sum_u2 = mu * total(found.W / above_zero, layout.columns)  # eq. 7, per matrix
                sum_u2 = total(sum_u2, layout.whole)  # per slice
            else:
                sum_u2 = found.sum_u2
            columns.append(Columns(column, mu.sqrt() * above_zero.rsqrt_()))
            checks.append(sum_u2.sum() + found.S.sum())  # S sees what overflows in a row and in no column
        sums_u2.append(sum_u2)
    for k, found in enumerate(sums):
        if found.spoilt is not None:
            checks[k] = checks[k] + found.spoilt
    finite = torch.stack(checks).isfinite()
    updated = finite if run.settings.skip_nonfinite else torch.ones_like(finite)
    moves = _moves(run, sums, sums_u2, updated)
    for w, found, finished, move in zip(run.work, sums, columns, moves, strict=True):
        _move(w, found.rows, finished, move)
    counted = updated.to(torch.int64)
    torch._foreach_add_([w.state["step"] for w in run.work], list(counted.unbind()))
    skipped.add_((1 - counted).sum())


def _moves(run: Run, sums: Sequence[Sums], sums_u2: Sequence[Tensor], updated: Tensor) -> Iterator[Move]:
    """Equations 9 and 10, for all slices of all tensors of a run in a few operations."""
    settings, hp = run.settings, run.settings.hyperparameters
    sizes = [w.layout.slice_size for w in run.work]
    counts = [sum_u2.numel() for sum_u2 in sums_u2]

    def means(values: Sequence[Tensor]) -> Tensor:
        return torch.cat([(value / n).reshape(-1) for value, n in zip(values, sizes, strict=True)])

    alpha = torch.cat([rho.expand(count) for rho, count in zip(run.rho, counts, strict=True)])
    rms_x = divisor = None
    if hp.scale_parameter:
        rms_x = means([_found(s.Q) for s in sums]).sqrt_()
        if settings.scale_after_decay:
            rms_x.mul_(torch.cat([s.abs().expand(count) for s, count in zip(run.shrink, counts, strict=True)]))
        alpha = alpha * rms_x.clamp_(min=hp.epsilon_2)  # eq. 9
    scale = torch.full_like(alpha, -1.0 if settings.maximize else 1.0)
    if hp.clip_threshold is not None:
        divisor = (means(sums_u2).sqrt_() / hp.clip_threshold).clamp_(min=1)  # eq. 10
        scale = scale / divisor
    if any(w.report is not None for w in run.work):
        ones = torch.ones_like(alpha)
        values = (means(sums_u2).sqrt_(), ones if divisor is None else divisor, ones if rms_x is None else rms_x)
        _report(run, torch.split(torch.stack(values, dim=1), counts), updated)
    if hp.momentum is None:
        scale = scale * alpha
    shrink = torch.where(updated, torch.stack(list(run.shrink)), 1.0).unbind()
    shapes = [kept(w.layout, w.layout.whole) if w.layout.batch else () for w in run.work]
    slices = ([part.view(s) for part, s in zip(torch.split(v, counts), shapes, strict=True)] for v in (scale, alpha))
    return map(Move, *slices, shrink, updated.unbind(), run.decay, run.t)


def _report(run: Run, values: Sequence[Tensor], updated: Tensor) -> None:
    """Fill the reports that are asked for; see `work.py`."""
    for w, value, made in zip(run.work, values, updated.unbind(), strict=True):
        if w.report is not None:
            last = w.report[:, :3]
            last.copy_(torch.where(made, value.to(last.dtype), last))
            w.report[:, 3].add_(~made)


def _move(w: Work, rows: Tensor | None, columns: Columns | None, move: Move) -> None:
    """Write the statistics, the momentum and the parameter of one tensor (eqs. 11 to 13)."""
    layout, settings, state = w.layout, w.settings, w.state
    hp, dtype = settings.hyperparameters, math_dtype(w.param.dtype)
    left_alone = ~move.updated
    momentum = hp.momentum

    def keep(old: Tensor, new: Tensor) -> None:
        if settings.skip_nonfinite:
            new = torch.where(move.updated, new, old)
        old.copy_(new)

    def per_slice(value: Tensor, piece: Block) -> Tensor:
        return at(value, reduced(piece, layout.whole)) if layout.batch else value

    if rows is not None and columns is not None:
        keep(state["row"].view_as(rows), rows)
        keep(state["column"].view_as(columns.column), columns.column)
        inverse_row = positive(rows).rsqrt_()
    coded = "momentum_scale" in w.slots
    for block, pieces in coded_blocks(w) if coded else blocks(w):
        for piece in pieces:
            g = at(w.grad, piece).to(dtype)
            factor = per_slice(move.scale, piece)
            if rows is None or columns is None:
                old = at(state["second_moment"], piece)
                v = torch.lerp(old, g * g + hp.epsilon_1, move.decay)  # eq. 11
                keep(old, v)
                u = positive(v).rsqrt_().mul_(g).mul_(factor)
            else:
                # With the columns, whose factor may be huge where there was no gradient, the scale could overflow.
                u = g * (at(inverse_row, reduced(block, layout.columns)) * factor)
                u.mul_(at(columns.factor, reduced(piece, layout.rows)))
            if momentum is not None:
                stored = at(state["momentum"], piece)
                scale = _scales(w, piece) if coded else None
                u.mul_(1 - momentum)
                if scale is None:
                    u = stored.to(dtype) * momentum + u  # eq. 12
                else:
                    u = int8.decode(stored, scale).to(dtype) * momentum + u
                if scale is None:
                    keep(stored, u)
                else:
                    codes, scales = int8.encode(u.to(torch.float32), _bits(w, piece, move))
                    keep(stored, codes)
                    keep(scale, scales)
                u.mul_(per_slice(move.alpha, piece))
            if settings.skip_nonfinite:
                u.masked_fill_(left_alone, 0)
            _write(w, piece, u, move)  # eq. 13


def _write(w: Work, piece: Block, update: Tensor, move: Move) -> None:
    """x <- shrink x - update, rounded once; ``residual`` is what rounding cut off it the last time."""
    x = at(w.param, piece)
    decays = bool(w.settings.weight_decay)
    if x.dtype == update.dtype:
        if decays:
            x.mul_(move.shrink)
        x.sub_(update)
        return
    exact = x.to(update.dtype)
    residual = at(w.state["residual"], piece) if w.compensated else None
    if residual is not None:
        exact = exact + residual
    exact = (exact * move.shrink if decays else exact) - update
    if w.settings.stochastic_rounding:
        exact = stochastic_round(exact, x.dtype, _bits(w, piece, move))
    if residual is None:
        x.copy_(exact)
        return
    rounded = exact.to(x.dtype)
    rest = (exact - rounded).masked_fill_(~rounded.isfinite(), 0)  # of what is not finite nothing is left
    if w.settings.skip_nonfinite:  # x + residual may be a tie, which rounds to another x than the one that is there
        rounded, rest = torch.where(move.updated, rounded, x), torch.where(move.updated, rest, residual)
    x.copy_(rounded)
    residual.copy_(rest)


def _bits(w: Work, piece: Block, move: Move) -> Tensor:
    """The random bits of this update for every element of a piece."""
    return random_bits(w.settings.seed, move.t, w.tensor, row_major(w.layout, piece, w.param.device))


def _scales(w: Work, piece: Block) -> Tensor:
    """The scales of the 8-bit momentum of a piece."""
    scale = w.state["momentum_scale"]
    if piece is None:
        return scale
    first, last = 0, 0
    for n, part in zip(w.layout.shape, piece, strict=True):
        first, last = first * n + part.start, last * n + part.stop - 1
    return scale[first // int8.BLOCK : last // int8.BLOCK + 1]


def positive(v: Tensor) -> Tensor:
    """v with 0 replaced by the least normal number: as a divisor and under a root it turns 0/0 into 0.

    Where a statistic is 0, so is every squared gradient behind it.
    """
    return v.clamp(min=torch.finfo(v.dtype).tiny)


def _found(sums: Tensor | None) -> Tensor:
    """A sum over blocks, of which there is at least one: empty tensors come to no kernel."""
    if sums is None:
        raise AssertionError("a kernel was given an empty tensor")
    return sums
