"""Adafactor in torch operations: any device, any strides, no question to the device.

The equation numbers are those of ``docs/algorithm.md``. Every statistic keeps its reduced axes as axes of length
1, so that rows, columns, stacks and batches of any order broadcast by themselves.

Large tensors are walked in blocks (`blocks.py`), so the largest temporary is a block, not a parameter. What is one
number per tensor is computed for a whole run of tensors at once.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from adafactor.engine.torch import int8
from adafactor.engine.torch.blocks import Block, at, blocks, coded_blocks, kept, reduced, total
from adafactor.engine.torch.checks import has_memory
from adafactor.engine.torch.rounding import random_bits, row_major, stochastic_round
from adafactor.engine.torch.work import MOST_UPDATES, Settings, Sums, Work, math_dtype


@dataclass(slots=True)
class Run:
    """Neighbours in the list that share a group and a dtype, and their scalars, of shape () each."""

    settings: Settings
    places: range
    t: Sequence[Tensor]  # int64, this update counted from 1
    ema_weight: Sequence[Tensor]  # 1 - beta(t), eq. 1
    rho: Sequence[Tensor]  # eq. 8
    decay_factor: Sequence[Tensor]  # 1 - lr * weight_decay


@dataclass(slots=True, eq=False)
class Pending:
    """One tensor between measure and apply. ``scale`` and ``alpha`` have shape (), or keep the batch axes."""

    work: Work
    grad: Tensor
    sums: Sums
    t: Tensor
    ema_weight: Tensor
    decay_factor: Tensor
    column: Tensor | None = None  # finished, eq. 3
    column_factor: Tensor | None = None  # sqrt(mu) column^(-1/2), eq. 13
    scale: Tensor | None = (
        None  # of the normalised update: clip and sign, and alpha too where no momentum comes between
    )
    alpha: Tensor | None = None  # eq. 9
    applied: Tensor | None = None  # bool: False leaves parameter and state alone


class Eager:
    """A list of work on one device, in torch operations. See `work.Backend`."""

    def __init__(self, work: Sequence[Work]) -> None:
        self.work = work
        self._runs: list[Run] = []
        self._pending: list[Pending] = []

    def counts(self) -> bool:
        steps = [w.state["step"] for w in self.work]
        if steps[0].device.type != "cpu" or not all(map(has_memory, steps)):
            return True
        least, most = torch.aminmax(torch.stack(steps))
        return int(least) >= 0 and int(most) < MOST_UPDATES

    def step(self, grads: Sequence[Tensor | None], skipped: Tensor) -> None:
        there = {w: grad for w, grad in zip(self.work, grads, strict=True) if grad is not None}
        if len(there) < len(grads):
            if there:
                Eager(list(there)).step(list(there.values()), skipped)
            return
        self.measure(list(there.values()))
        self.finish()
        self.apply(skipped)

    def measure(self, grads: Sequence[Tensor]) -> list[Sums]:
        """Read g and x once (eqs. 2 to 6, and 11 for an unfactored parameter). Nothing is written."""
        self._runs = list(runs(self.work))
        self._pending = []
        for run in self._runs:
            for place, t, ema_weight, decay_factor in zip(
                run.places, run.t, run.ema_weight, run.decay_factor, strict=True
            ):
                w, grad = self.work[place], grads[place]
                sums = measure(w, grad, ema_weight)
                self._pending.append(Pending(w, grad, sums, t, ema_weight, decay_factor))
        return [tensor.sums for tensor in self._pending]

    def measure_again(self) -> None:
        """Finish the rows of parts that are cut along both sides, whose sums are complete now, and read g again."""
        for tensor in self._pending:
            if tensor.work.layout.cut == "both":
                weigh(tensor)

    def finish_columns(self, places: Sequence[int]) -> None:
        for place in places:
            finish_columns(self._pending[place])

    def finish(self) -> None:
        """Equations 3, 7, 9 and 10."""
        for run in self._runs:
            finish(run, [self._pending[place] for place in run.places])

    def apply(self, skipped: Tensor, absent: Container[int] = ()) -> None:
        """Write everything but what is ``absent``, which has no gradient anywhere."""
        applied = []
        for place, tensor in enumerate(self._pending):
            if place not in absent:
                assert tensor.applied is not None
                move(tensor)
                applied.append((tensor.work.state["step"], tensor.applied.to(torch.int64)))
        if applied:
            torch._foreach_add_([step for step, _ in applied], [count for _, count in applied])
            skipped.add_(len(applied) - torch.stack([count for _, count in applied]).sum())

    def release(self) -> None:
        """Let go of the gradients and the sums."""
        self._runs, self._pending = [], []


def runs(work: Sequence[Work]) -> Iterator[Run]:
    """Equations 1 and 8, for a run of parameters at once: t may differ, and only the device knows it."""
    for _, members in groupby(range(len(work)), lambda k: (id(work[k].group), math_dtype(work[k].param.dtype))):
        places = list(members)
        first = work[places[0]]
        settings, lr, dtype = first.settings, first.group.lr, math_dtype(first.param.dtype)
        hp = settings.hyperparameters
        t = torch.stack([work[k].state["step"] for k in places]) + 1
        # float32 has integers up to 2**24 only; where there is no float64, a later t is rounded by 1 part in 2**24.
        exact = t.to(torch.float32 if t.device.type == "mps" else torch.float64)
        ema_weight = exact**hp.beta_2_decay
        if hp.beta_2_max is not None:
            ema_weight = ema_weight.clamp(min=1.0 - hp.beta_2_max)
        if isinstance(lr, Tensor):
            lr = lr.detach().reshape(()).to(exact.device, exact.dtype, non_blocking=True)
        rate = torch.ones_like(exact) * lr
        rho = torch.minimum(rate, exact.rsqrt()) if hp.caps(settings.scheduled) else rate
        decay_factor = 1.0 - rate * settings.weight_decay
        scalars = [values.to(dtype).unbind() for values in (ema_weight, rho, decay_factor)]
        yield Run(settings, range(places[0], places[-1] + 1), t.unbind(), *scalars)


def measure(w: Work, grad: Tensor, ema_weight: Tensor) -> Sums:
    """Read g and x once (eqs. 2 to 6, and 11 for an unfactored parameter). Nothing is written.

    Of a part that is cut along both sides, ``rows`` are sums of g² and W is for `weigh` to find.
    """
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
        for block, _ in blocks(w, grad):
            q = squares(grad, block)
            v = torch.lerp(at(w.state["second_moment"], block), q + hp.epsilon_1, ema_weight)  # eq. 11
            W = add(W, q.div_(positive(v)), block, layout.whole)
            if hp.scale_parameter:
                Q = add(Q, squares(w.param, block), block, layout.whole)  # eq. 6
        return Sums(None, None, _there(W), Q)

    old = w.state["row"].view(kept(layout, layout.columns))
    cut = layout.cut == "both"
    rows: Tensor | None = None
    for block, pieces in blocks(w, grad):
        band = reduced(block, layout.columns)
        sums: Tensor | None = None
        squared: Tensor | None = None
        for piece in pieces:
            squared = squares(grad, piece)
            part = total(squared, layout.columns)
            sums = part if sums is None else sums + part
        row = _there(sums)
        if not cut:
            row = torch.lerp(at(old, band), row / layout.m + hp.epsilon_1, ema_weight)  # eq. 2
        if block is None:
            rows = row
        else:
            rows = torch.empty_like(old) if rows is None else rows
            at(rows, band).copy_(row)
        inverse = None if cut else positive(row).rsqrt_()
        for piece in pieces:
            g2 = squares(grad, piece) if squared is None or len(pieces) > 1 else squared
            S = add(S, g2, piece, layout.rows)  # eq. 4
            if inverse is not None:
                # Divided before it is squared: g² alone is 0 below 1e-23, where u can still be large.
                torch.mul(at(grad, piece), inverse, out=g2)
                W = add(W, g2.square_(), piece, layout.rows)  # eq. 5
            if hp.scale_parameter:
                Q = add(Q, squares(w.param, piece), piece, layout.whole)
    return Sums(rows, S, torch.zeros_like(_there(S)) if cut else _there(W), Q)


def weigh(tensor: Pending) -> None:
    """Equations 2 and 5 of a part whose row sums are complete now: g is read again."""
    w, sums = tensor.work, tensor.sums
    layout, hp = w.layout, w.settings.hyperparameters
    assert sums.rows is not None
    old = w.state["row"].view_as(sums.rows)
    sums.rows = torch.lerp(old, sums.rows / layout.m + hp.epsilon_1, tensor.ema_weight)  # eq. 2
    if not layout.size:
        return
    inverse = positive(sums.rows).rsqrt_()
    for _, pieces in blocks(w, tensor.grad):
        for piece in pieces:
            g = at(tensor.grad, piece).to(sums.W.dtype)
            weighted = (g * at(inverse, reduced(piece, layout.columns))).square_()  # divided first, as in `measure`
            at(sums.W, reduced(piece, layout.rows)).add_(total(weighted, layout.rows))  # eq. 5


def finish_columns(tensor: Pending) -> None:
    """The finished columns (eq. 3), their sum and that of W / column, of every matrix."""
    layout, sums = tensor.work.layout, tensor.sums
    if sums.S is None or tensor.column is not None:
        return
    old = tensor.work.state["column"].view_as(sums.S)
    epsilon_1 = tensor.work.settings.hyperparameters.epsilon_1
    tensor.column = torch.lerp(old, sums.S / layout.n + epsilon_1, tensor.ema_weight)
    sums.columns = total(tensor.column, layout.columns)
    sums.weighted = total(sums.W / positive(tensor.column), layout.columns)


def finish(run: Run, tensors: Sequence[Pending]) -> None:
    """Equations 3, 7, 9 and 10, the latter for all slices of all tensors of a run in a few operations."""
    settings, hp = run.settings, run.settings.hyperparameters
    squares, checks = [], []
    for tensor in tensors:
        layout, sums = tensor.work.layout, tensor.sums
        finish_columns(tensor)
        if tensor.column is None or sums.columns is None or sums.weighted is None or sums.S is None:
            u2 = sums.W if sums.u2 is None else sums.u2
            checks.append(u2.sum())
        else:
            mu = sums.columns / layout.m if sums.mu is None else sums.mu
            u2 = total(mu * sums.weighted, layout.whole) if sums.u2 is None else sums.u2  # eq. 7, per slice
            tensor.column_factor = mu.sqrt() * positive(tensor.column).rsqrt_()
            checks.append(u2.sum() + sums.S.sum())  # S sees what overflows in a row and in no column
        squares.append(u2)
        if sums.nonfinite is not None:
            checks[-1] = checks[-1] + sums.nonfinite
    finite = torch.stack(checks).isfinite()
    applied = finite if settings.skip_nonfinite else torch.ones_like(finite)

    sizes = [tensor.work.layout.slice_size for tensor in tensors]
    counts = [u2.numel() for u2 in squares]

    def means(values: Sequence[Tensor]) -> Tensor:
        return torch.cat([(value / n).reshape(-1) for value, n in zip(values, sizes, strict=True)])

    def per_slice(values: Sequence[Tensor]) -> Tensor:
        return torch.cat([value.expand(count) for value, count in zip(values, counts, strict=True)])

    alpha = per_slice(run.rho)
    rms_x = clip = None
    if hp.scale_parameter:
        rms_x = means([_there(tensor.sums.Q) for tensor in tensors]).sqrt_()
        if settings.scale_after_decay:
            rms_x.mul_(per_slice([factor.abs() for factor in run.decay_factor]))
        alpha = alpha * rms_x.clamp_(min=hp.epsilon_2)  # eq. 9
    scale = torch.full_like(alpha, -1.0 if settings.maximize else 1.0)
    if hp.clip_threshold is not None:
        clip = (means(squares).sqrt_() / hp.clip_threshold).clamp_(min=1)  # eq. 10
        scale = scale / clip
    if any(tensor.work.diagnostics is not None for tensor in tensors):
        ones = torch.ones_like(alpha)
        columns = (means(squares).sqrt_(), ones if clip is None else clip, ones if rms_x is None else rms_x)
        values = torch.split(torch.stack(columns, dim=1), counts)
        for tensor, value, made in zip(tensors, values, applied.unbind(), strict=True):
            if tensor.work.diagnostics is not None:
                diagnose(tensor.work.diagnostics, value, made)
    if hp.momentum is None:
        scale = scale * alpha
    factors = torch.where(applied, torch.stack(list(run.decay_factor)), 1.0).unbind()
    each = zip(tensors, *(torch.split(v, counts) for v in (scale, alpha)), applied.unbind(), factors, strict=True)
    for tensor, its_scale, its_alpha, made, factor in each:
        layout = tensor.work.layout
        shape = kept(layout, layout.whole) if layout.batch else ()
        tensor.scale, tensor.alpha = its_scale.view(shape), its_alpha.view(shape)
        tensor.applied, tensor.decay_factor = made, factor


def diagnose(diagnostics: Tensor, values: Tensor, made: Tensor) -> None:
    """Fill ``Work.diagnostics`` of one tensor."""
    last = diagnostics[:, :3]
    last.copy_(torch.where(made, values.to(last.dtype), last))
    diagnostics[:, 3].add_(~made)


def move(tensor: Pending) -> None:
    """Write the statistics, the momentum and the parameter of one tensor (eqs. 11 to 13)."""
    w = tensor.work
    layout, settings, state, grad = w.layout, w.settings, w.state, tensor.grad
    hp, dtype, rows = settings.hyperparameters, math_dtype(w.param.dtype), tensor.sums.rows
    momentum = hp.momentum
    assert tensor.applied is not None
    assert tensor.scale is not None
    assert tensor.alpha is not None

    def keep(old: Tensor, new: Tensor) -> None:
        if settings.skip_nonfinite:
            assert tensor.applied is not None
            new = torch.where(tensor.applied, new, old)
        old.copy_(new)

    def per_slice(value: Tensor, piece: Block) -> Tensor:
        return at(value, reduced(piece, layout.whole)) if layout.batch else value

    if rows is not None and tensor.column is not None:
        keep(state["row"].view_as(rows), rows)
        keep(state["column"].view_as(tensor.column), tensor.column)
        inverse_row = positive(rows).rsqrt_()
    coded = "momentum_scale" in w.slots
    for block, pieces in coded_blocks(w) if coded else blocks(w, grad):
        for piece in pieces:
            g = at(grad, piece).to(dtype)
            factor = per_slice(tensor.scale, piece)
            if rows is None or tensor.column_factor is None:
                old = at(state["second_moment"], piece)
                v = torch.lerp(old, g * g + hp.epsilon_1, tensor.ema_weight)  # eq. 11
                keep(old, v)
                u = positive(v).rsqrt_().mul_(g).mul_(factor)
            else:
                # With the columns, whose factor may be huge where there was no gradient, the scale could overflow.
                u = g * (at(inverse_row, reduced(block, layout.columns)) * factor)
                u.mul_(at(tensor.column_factor, reduced(piece, layout.rows)))
            if momentum is not None:
                stored = at(state["momentum"], piece)
                scale = _scales(w, piece) if coded else None
                u.mul_(1 - momentum)
                u = (stored if scale is None else int8.decode(stored, scale)).to(dtype) * momentum + u  # eq. 12
                if scale is None:
                    keep(stored, u)
                else:
                    codes, scales = int8.encode(u.to(torch.float32), _bits(tensor, piece))
                    keep(stored, codes)
                    keep(scale, scales)
                u.mul_(per_slice(tensor.alpha, piece))
            if settings.skip_nonfinite:
                u.masked_fill_(~tensor.applied, 0)
            _write(tensor, piece, u)  # eq. 13


def _write(tensor: Pending, piece: Block, update: Tensor) -> None:
    """x <- decay_factor x - update, rounded once; ``residual`` is what rounding cut off it the last time."""
    w = tensor.work
    x = at(w.param, piece)
    decays = bool(w.settings.weight_decay)
    if x.dtype == update.dtype:
        if decays:
            x.mul_(tensor.decay_factor)
        x.sub_(update)
        return
    exact = x.to(update.dtype)
    residual = at(w.state["residual"], piece) if w.compensated else None
    if residual is not None:
        exact = exact + residual
    exact = (exact * tensor.decay_factor if decays else exact) - update
    if w.settings.stochastic_rounding:
        exact = stochastic_round(exact, x.dtype, _bits(tensor, piece))
    if residual is None:
        x.copy_(exact)
        return
    rounded = exact.to(x.dtype)
    rest = (exact - rounded).masked_fill_(~rounded.isfinite(), 0)  # of what is not finite nothing is left
    if w.settings.skip_nonfinite:  # x + residual may be a tie, which rounds to another x than the one that is there
        assert tensor.applied is not None
        rounded, rest = torch.where(tensor.applied, rounded, x), torch.where(tensor.applied, rest, residual)
    x.copy_(rounded)
    residual.copy_(rest)


def _bits(tensor: Pending, piece: Block) -> Tensor:
    """The random bits of this update for every element of a piece."""
    w = tensor.work
    return random_bits(w.settings.seed, tensor.t, w.rng_stream, row_major(w.layout, piece, w.param.device))


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


def _there(sums: Tensor | None) -> Tensor:
    """A sum over blocks, of which there is at least one."""
    assert sums is not None
    return sums
