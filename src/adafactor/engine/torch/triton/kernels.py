"""The Triton kernels: measure and apply for a whole list of CUDA tensors, whatever their number.

A program finds its work in tables (``table.py``): a block names a tensor, and the tensor's record holds its
addresses and its numbers. A tile is K matrices × NP rows × M columns; a matrix has rows of ``m`` neighbours,
``inner * m`` apart, or where it is TRANSPOSED columns of ``n`` neighbours. Equation numbers are those of
``docs/algorithm.md``.

    begin     per tensor: t, eq. 1 and eq. 8
    measure   rows, and per part of a matrix S and W, and Q (eqs. 2, 4, 5, 6); flat tensors eq. 11
    row_sums  Σg² of rows that a tile, or this process, does not hold as a whole, from what measure has left of it
    columns   S and W over the parts, to which other processes add theirs; the columns (eq. 3), and what eq. 7 needs
    slices    Σu² and Q of a clip factor
    finish    per tensor: whether it is updated; per slice eqs. 9 and 10
    count     t, and how many tensors were left alone
    apply     eqs. 11 to 13; the statistics are written here and not before
    on_chip   all of these but begin, for a tensor that one program holds

A gradient whose address is 0 is none: its tensor is left alone, and not counted.
No sum depends on the order in which programs run.
"""

from __future__ import annotations

import triton
import triton.language as tl

from adafactor.engine.torch.int8 import BLOCK as CODED
from adafactor.engine.torch.triton.numbers import move
from adafactor.engine.torch.triton.table import BLOCK_FIELDS, FIELDS, FLAGS, NO_CLIP, NUMBERS, SLICE_FIELDS

# A record's fields, as constants that a kernel may use.
_F, _G = tl.constexpr(len(FIELDS)), tl.constexpr(len(NUMBERS))
_B, _L = tl.constexpr(len(BLOCK_FIELDS)), tl.constexpr(len(SLICE_FIELDS))
(
    _PARAM, _FIRST, _SECOND, _MOMENTUM, _SCALES, _RESIDUAL, _DIAGNOSTICS, _STEP, _LR, _FLAGS, _SEED, _RNG_STREAM,
    _N, _INNER, _m, _MATRICES, _PER_SLICE, _SLICES, _SLICE_SIZE, _SIZE, _PARTS, _PART_ROWS, _CHUNKS,
    _GLOBAL_ROWS, _GLOBAL_COLUMNS, _GLOBAL_SIZE, _ROW_OFFSET, _COLUMN_OFFSET,
    _SUMS, _FINISHED, _ROOT_MU, _SLICE, _TILES, _PARTIAL, _SQUARES, _MOVED, _ROW_PARTS, _ROW_TOTALS,
) = (tl.constexpr(k) for k in range(len(FIELDS)))  # fmt: skip
_EXPONENT, _LEAST, _EPS1, _EPS2, _CLIP, _DECAYS, _BETA1 = (tl.constexpr(k) for k in range(len(NUMBERS)))
_CAPS, _SCALE, _AFTER_DECAY, _MAXIMIZE, _SKIP = (tl.constexpr(1 << k) for k in range(len(FLAGS)))
_NONE = tl.constexpr(NO_CLIP)
_BLOCK = tl.constexpr(CODED)
_TINY = tl.constexpr(1.1754943508222875e-38)  # the least normal float32


def dtype(name: str) -> tl.dtype:
    """Triton's word for a dtype."""
    return getattr(tl, name)


@triton.jit
def _inverse_root(v):
    """v^(-1/2); finite where v is 0, for then so is every gradient behind it. Not finite where v is not."""
    return tl.rsqrt(tl.maximum(v, _TINY)) + (v - v)


@triton.jit
def _average(old, new, ema_weight, past, eps1):
    """A statistic of one more update, from its mean of g² (eqs. 2 and 3) or from g² itself (eq. 11)."""
    return past * old + ema_weight * (new + eps1)


@triton.jit
def _weighted(W, c):
    """What a column adds to Σu² (eq. 7) for a mean of 1; W is 0 where c is."""
    return W / tl.maximum(c, _TINY)


@triton.jit
def _mean_and_u2(columns, weighted, m):
    """The mean of a matrix's columns and its Σu² (eq. 7), from the sums of columns and of what they add to it."""
    mu = columns / m.to(tl.float32)
    return mu, mu * weighted


@triton.jit
def _pointer(address, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    pointer = address.to(tl.pointer_type(DTYPE))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def _block(blocks):
    """A program's entry in the table: the tensor, and what the kernel says. ``multiple_of`` of these has no effect."""
    block = blocks + tl.program_id(0) * _B
    return tl.load(block), tl.load(block + 1), tl.load(block + 2), tl.load(block + 3), tl.load(block + 4)


@triton.jit
def _run(blocks, ALIGNED: tl.constexpr):
    """The same of a run of elements: the tensor, where the run begins and ends, and its number."""
    block = blocks + tl.program_id(0) * _B
    start, end = tl.load(block + 1), tl.load(block + 2)
    if ALIGNED:
        start, end = tl.multiple_of(start, 16), tl.multiple_of(end, 16)
    return tl.load(block), start, end, tl.load(block + 3)


@triton.jit
def _weights(scalars, numbers, tensor):
    """What `_average` takes: 1 - beta(t), beta(t) and eps1."""
    eps1 = tl.load(numbers + tensor * _G + _EPS1).to(tl.float32)
    return tl.load(scalars + tensor * 4), tl.load(scalars + tensor * 4 + 1), eps1


@triton.jit
def _matrices(record, TRANSPOSED: tl.constexpr, ALIGNED: tl.constexpr):
    """Columns, rows, matrices inside and in all, parts and their rows."""
    m, n, part_rows = tl.load(record + _m), tl.load(record + _N), tl.load(record + _PART_ROWS)
    if ALIGNED:
        m = tl.multiple_of(m, 16)
    if TRANSPOSED and ALIGNED:
        n, part_rows = tl.multiple_of(n, 16), tl.multiple_of(part_rows, 16)
    return m, n, tl.load(record + _INNER), tl.load(record + _MATRICES), tl.load(record + _PARTS), part_rows


@triton.jit
def _target(record, PARAM: tl.constexpr, MOMENTUM: tl.constexpr, COMPENSATED: tl.constexpr, ALIGNED: tl.constexpr):
    """What `move` writes: where a parameter, momentum, its scales and the residual begin, the parameter for what is not
    there. And what names the random bits for it: the seed, the stream, and the updates made."""
    param = _pointer(tl.load(record + _PARAM), PARAM, ALIGNED)
    momentum, scales, residual = param, param, param
    if MOMENTUM is not None:
        momentum = _pointer(tl.load(record + _MOMENTUM), MOMENTUM, ALIGNED)
        scales = tl.load(record + _SCALES).to(tl.pointer_type(tl.float32))
    if COMPENSATED:
        residual = _pointer(tl.load(record + _RESIDUAL), tl.bfloat16, ALIGNED)
    made = tl.load(tl.load(record + _STEP).to(tl.pointer_type(tl.int64)))
    return param, momentum, scales, residual, tl.load(record + _SEED), tl.load(record + _RNG_STREAM), made


@triton.jit
def _divide(first, local, divisor, HUGE: tl.constexpr):
    """Quotient and remainder, int64, of first + local; ``first`` is one number. 32 bits suffice unless HUGE."""
    if HUGE:
        e = first + local.to(tl.int64)
        return e // divisor, e % divisor
    else:
        by = divisor.to(tl.uint32)
        e = (first % divisor).to(tl.uint32) + local.to(tl.uint32)
        quotient = e // by
        return (first // divisor) + quotient.to(tl.int64), (e - quotient * by).to(tl.int64)


@triton.jit
def _number(record, run, outer, n, inner):
    """The number that the first element of a run has in the whole parameter, of which this may be a part."""
    missing = outer * (tl.load(record + _GLOBAL_ROWS) - n) + tl.load(record + _ROW_OFFSET)
    return (run + missing * inner) * tl.load(record + _GLOBAL_COLUMNS) + tl.load(record + _COLUMN_OFFSET)


@triton.jit(do_not_specialize=["count"])
def begin(tensors, numbers, lrs, scalars, count, BLOCK: tl.constexpr):
    """1 - beta(t), beta(t), rho and 1 - lr * weight_decay of every tensor, from the update it is about to make."""
    k = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = k < count
    record, number = tensors + k * _F, numbers + k * _G
    step = tl.load(record + _STEP, mask=mask, other=0).to(tl.pointer_type(tl.int64))
    t = (tl.load(step, mask=mask, other=0) + 1).to(tl.float64)
    ema_weight = tl.exp2(tl.load(number + _EXPONENT, mask=mask, other=0) * tl.log2(t))
    ema_weight = tl.maximum(ema_weight, tl.load(number + _LEAST, mask=mask, other=0))
    rate = tl.load(lrs + tl.load(record + _LR, mask=mask, other=0), mask=mask, other=0)
    caps = (tl.load(record + _FLAGS, mask=mask, other=0) & _CAPS) != 0
    limit = 1.0 / tl.sqrt(t)
    rho = tl.where(caps & (rate > limit), limit, rate)
    decay_factor = 1.0 - rate * tl.load(number + _DECAYS, mask=mask, other=0)
    out = scalars + k * 4
    tl.store(out, ema_weight.to(tl.float32), mask=mask)
    tl.store(out + 1, (1.0 - ema_weight).to(tl.float32), mask=mask)
    tl.store(out + 2, rho.to(tl.float32), mask=mask)
    tl.store(out + 3, decay_factor.to(tl.float32), mask=mask)


# Where the row sums that `measure` needs come from: its own tile, nowhere yet (it leaves its chunk's), or `row_sums`.
IN_TILE, TO_COME, GIVEN = (tl.constexpr(k) for k in range(3))


@triton.jit
def _offsets(k, i, run, j, n, m, TRANSPOSED: tl.constexpr):
    """Where elements stand: rows are numbered by ``run``, and by ``i`` in their matrix ``k``."""
    if TRANSPOSED:
        offset = (k[:, None, None] * m + j[None, None, :]) * n + i[None, :, None]
    else:
        offset = run[:, :, None] * m + j[None, None, :]
    return offset


@triton.jit
def measure(
    tensors, numbers, grads, scalars, blocks, sums, squares,
    K: tl.constexpr, NP: tl.constexpr, M: tl.constexpr, PARAM: tl.constexpr, GRAD: tl.constexpr,
    SCALE: tl.constexpr, ROWS: tl.constexpr, TRANSPOSED: tl.constexpr, ALIGNED: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One part of K matrices: finishes its rows, and leaves its share of S, W and Q in buffers. g is read once."""
    tensor, matrix, part, chunk, _ = _block(blocks)
    address = tl.load(grads + tensor)
    if address == 0:
        return
    record = tensors + tensor * _F
    m, n, inner, matrices, parts, part_rows = _matrices(record, TRANSPOSED, ALIGNED)
    chunks = tl.load(record + _CHUNKS)
    ema_weight, past, eps1 = _weights(scalars, numbers, tensor)
    grad = _pointer(address, GRAD, ALIGNED)
    param = _pointer(tl.load(record + _PARAM), PARAM, ALIGNED)
    row = tl.load(record + _FIRST).to(tl.pointer_type(tl.float32))
    finished = sums + tl.load(record + _FINISHED)
    row_parts, row_totals = sums + tl.load(record + _ROW_PARTS), sums + tl.load(record + _ROW_TOTALS)
    width = tl.load(record + _GLOBAL_COLUMNS).to(tl.float32)
    k = matrix + tl.arange(0, K)
    first = k // inner * n * inner + k % inner  # the run of a matrix's row 0
    j = chunk * M + tl.arange(0, M)
    S = tl.zeros((K, M), tl.float32)
    W = tl.zeros((K, M), tl.float32)
    Q = tl.zeros((K,), tl.float32)
    here = (k < matrices)[:, None]
    finishes = tl.where(chunk == 0, n, 0)  # rows whose statistic this program stores
    for i0 in tl.range(part * part_rows, tl.minimum((part + 1) * part_rows, n), NP, num_stages=STAGES):
        i = i0 + tl.arange(0, NP)
        run = first[:, None] + i[None, :] * inner
        inside = here & (i < n)[None, :]
        offset = _offsets(k, i, run, j, n, m, TRANSPOSED)
        mask = inside[:, :, None] & (j < m)[None, None, :]
        g = tl.load(grad + offset, mask=mask, other=0).to(tl.float32)
        g2 = g * g
        S += tl.sum(g2, axis=1)  # eq. 4
        if ROWS == TO_COME:
            tl.store(row_parts + run * chunks + chunk, tl.sum(g2, axis=2), mask=inside)
        else:
            if ROWS == GIVEN:
                total = tl.load(row_totals + run, mask=inside, other=0)
            else:
                total = tl.sum(g2, axis=2)
            r = tl.load(row + run, mask=inside, other=0)
            r = _average(r, total / width, ema_weight, past, eps1)  # eq. 2
            tl.store(finished + run, r, mask=here & (i < finishes)[None, :])
            u = g * _inverse_root(r)[:, :, None]
            W += tl.sum(u * u, axis=1)  # eq. 5
        if SCALE:
            x = tl.load(param + offset, mask=mask, other=0).to(tl.float32)
            Q += tl.sum(tl.sum(x * x, axis=2), axis=1)  # eq. 6
    slot = k * parts + part
    share = tl.load(record + _SUMS)
    if ALIGNED:
        share = tl.multiple_of(share, 16)
    out = sums + share + slot[:, None] * m + j[None, :]
    known = (k < matrices)[:, None] & (j < m)[None, :]
    tl.store(out, S, mask=known)
    tl.store(out + matrices * parts * m, W, mask=known)
    if SCALE:  # apply cuts wide rows into up to eight, and leaves the next sums there
        moved = tl.load(record + _MOVED)
        per_chunk = (moved + chunks - 1) // chunks
        c = tl.arange(0, 8)
        slots = tl.load(record + _SQUARES) + slot[:, None] * moved + chunk * per_chunk + c[None, :]
        tl.store(
            squares + slots,
            tl.where((c == 0)[None, :], Q[:, None], 0.0),
            mask=here & (c < per_chunk)[None, :] & (chunk * per_chunk + c < moved)[None, :],
        )


@triton.jit
def row_sums(tensors, grads, blocks, sums, NP: tl.constexpr, C: tl.constexpr):
    """Σg² of the rows of one part of a matrix, over what the chunks of its columns have left."""
    tensor, matrix, part, chunk, _ = _block(blocks)
    if (tl.load(grads + tensor) == 0) | (chunk > 0):
        return
    record = tensors + tensor * _F
    n, inner, chunks = tl.load(record + _N), tl.load(record + _INNER), tl.load(record + _CHUNKS)
    part_rows = tl.load(record + _PART_ROWS)
    source, target = sums + tl.load(record + _ROW_PARTS), sums + tl.load(record + _ROW_TOTALS)
    first = matrix // inner * n * inner + matrix % inner
    end = tl.minimum((part + 1) * part_rows, n)
    for i0 in range(part * part_rows, end, NP):
        i = i0 + tl.arange(0, NP)
        run = first + i * inner
        total = tl.zeros((NP,), tl.float32)
        for c0 in range(0, chunks, C):
            c = c0 + tl.arange(0, C)
            there = (i < end)[:, None] & (c < chunks)[None, :]
            total += tl.sum(tl.load(source + run[:, None] * chunks + c[None, :], mask=there, other=0), axis=1)
        tl.store(target + run, total, mask=i < end)


@triton.jit
def measure_flat(
    tensors, numbers, grads, scalars, blocks, partials, squares,
    BLOCK: tl.constexpr, PARAM: tl.constexpr, GRAD: tl.constexpr, SCALE: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """One piece of a slice of an unfactored tensor: its Σu² (eq. 11), a check, and its Σx²."""
    tensor, start, end, index = _run(blocks, ALIGNED)
    address = tl.load(grads + tensor)
    if address == 0:
        return
    record = tensors + tensor * _F
    ema_weight, past, eps1 = _weights(scalars, numbers, tensor)
    grad = _pointer(address, GRAD, ALIGNED)
    param = _pointer(tl.load(record + _PARAM), PARAM, ALIGNED)
    second_moment = _pointer(tl.load(record + _FIRST), tl.float32, ALIGNED)
    u2 = tl.zeros((BLOCK,), tl.float32)
    check = tl.zeros((BLOCK,), tl.float32)
    Q = tl.zeros((BLOCK,), tl.float32)
    for first in range(start, end, BLOCK):
        e = first + tl.arange(0, BLOCK)
        mask = e < end
        g = tl.load(grad + e, mask=mask, other=0).to(tl.float32)
        v = _average(tl.load(second_moment + e, mask=mask, other=0), g * g, ema_weight, past, eps1)
        u = g * _inverse_root(v)
        u2 += tl.where(mask, u * u, 0.0)
        check += g * g
        if SCALE:
            x = tl.load(param + e, mask=mask, other=0).to(tl.float32)
            Q += x * x
    out = partials + (tl.load(record + _PARTIAL) + index) * 3
    tl.store(out, tl.sum(u2))
    tl.store(out + 2, tl.sum(check))
    if SCALE:
        tl.store(squares + tl.load(record + _SQUARES) + index, tl.sum(Q))


@triton.jit
def columns(
    tensors, numbers, grads, scalars, blocks, sums, partials, roots,
    K: tl.constexpr, P: tl.constexpr, C: tl.constexpr, ADD: tl.constexpr, FINISH: tl.constexpr,
    MATRIX_SUMS: tl.constexpr,
):  # fmt: skip
    """C columns of K matrices: S and W over all parts, or the columns and what eq. 7 needs of them.

    S and the columns are left in the place of the first part's S, which nobody else reads. Where the tile holds all
    columns of its matrices their Σu² is known here; otherwise `slices` adds up the tiles.
    ADD: or else that was done before. FINISH: the columns (eq. 3).
    MATRIX_SUMS: leave the sum of each matrix's columns, and of W / column: eq. 7 takes other processes' too.
    """
    tensor, matrix, tile, end, index = _block(blocks)
    if tl.load(grads + tensor) == 0:
        return
    record = tensors + tensor * _F
    m, parts, matrices = tl.load(record + _m), tl.load(record + _PARTS), tl.load(record + _MATRICES)
    k = matrix + tl.arange(0, K)
    j = tile * C + tl.arange(0, C)
    mask = (k < end)[:, None] & (j < m)[None, :]
    first_S = sums + tl.load(record + _SUMS) + k[:, None] * parts * m + j[None, :]
    first_W = first_S + matrices * parts * m
    S = tl.zeros((K, C), tl.float32)
    W = tl.zeros((K, C), tl.float32)
    for p0 in range(0, parts if ADD else 1, P):
        p = p0 + tl.arange(0, P)
        inside = mask[:, None, :] & (p < parts)[None, :, None]
        S += tl.sum(tl.load(first_S[:, None, :] + p[None, :, None] * m, mask=inside, other=0), axis=1)
        W += tl.sum(tl.load(first_W[:, None, :] + p[None, :, None] * m, mask=inside, other=0), axis=1)
    if not FINISH:
        tl.store(first_S, S, mask=mask)
        tl.store(first_W, W, mask=mask)
    else:
        ema_weight, past, eps1 = _weights(scalars, numbers, tensor)
        old = tl.load(record + _SECOND).to(tl.pointer_type(tl.float32)) + k[:, None] * m + j[None, :]
        n = tl.load(record + _GLOBAL_ROWS).to(tl.float32)
        c = _average(tl.load(old, mask=mask, other=0), S / n, ema_weight, past, eps1)  # eq. 3
        c = tl.where(mask, c, 0.0)
        tl.store(first_S, c, mask=mask)
        total = tl.sum(c, axis=1)
        weighted = tl.sum(tl.where(mask, _weighted(W, c), 0.0), axis=1)
        out = partials + (tl.load(record + _PARTIAL) + index) * 3
        tl.store(out + 2, tl.sum(S) + tl.sum(W))
        mu, u2 = _mean_and_u2(total, weighted, m)
        tiles = tl.load(record + _TILES)
        if tiles == 1:
            tl.store(roots + tl.load(record + _ROOT_MU) + k, tl.sqrt(mu), mask=k < end)
        if tl.where(tiles == 1, 0 if MATRIX_SUMS else 1, 0) != 0:
            tl.store(out, tl.sum(u2))
        else:
            tl.store(out, tl.sum(total))
            tl.store(out + 1, tl.sum(weighted))


@triton.jit
def slices(
    tensors, grads, table, partials, squares, roots, slice_sums,
    MEASURED: tl.constexpr, FINISHED: tl.constexpr, KB: tl.constexpr, TB: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Σu², the check and Q of one slice, from what the programs before have left of it.

    MEASURED: what measure left: Q, and all of an unfactored tensor. FINISHED: what `columns` left.
    """
    which = tl.program_id(0)
    entry = table + which * _L
    tensor, k_begin, k_end = tl.load(entry), tl.load(entry + 1), tl.load(entry + 2)
    p_begin, p_end, q_begin, q_end = (
        tl.load(entry + 3), tl.load(entry + 4), tl.load(entry + 5), tl.load(entry + 6),
    )  # fmt: skip
    if tl.load(grads + tensor) == 0:
        return
    record = tensors + tensor * _F
    out = slice_sums + which * 3
    if MEASURED:
        Q = tl.zeros((BLOCK,), tl.float32)
        for q0 in range(q_begin, q_end, BLOCK):
            q = q0 + tl.arange(0, BLOCK)
            Q += tl.load(squares + tl.load(record + _SQUARES) + q, mask=q < q_end, other=0)
        tl.store(out + 1, tl.sum(Q))
    flat = tl.load(record + _SECOND) == 0
    if tl.where(flat, 1 if MEASURED else 0, 1 if FINISHED else 0) != 0:
        tiles, m = tl.load(record + _TILES), tl.load(record + _m)
        start, root_mu = partials + tl.load(record + _PARTIAL) * 3, roots + tl.load(record + _ROOT_MU)
        check = tl.zeros((BLOCK,), tl.float32)
        u2 = tl.zeros((BLOCK,), tl.float32)
        for p0 in range(p_begin, p_end, BLOCK):
            p = p0 + tl.arange(0, BLOCK)
            check += tl.load(start + p * 3 + 2, mask=p < p_end, other=0)
            u2 += tl.load(start + p * 3, mask=p < tl.where(tiles == 1, p_end, 0), other=0)
        per_matrix = tl.zeros((KB,), tl.float32)
        for k0 in range(k_begin, tl.where(tiles == 1, k_begin, k_end), KB):
            k = k0 + tl.arange(0, KB)
            total = tl.zeros((KB,), tl.float32)
            weighted = tl.zeros((KB,), tl.float32)
            for c0 in range(0, tiles, TB):
                c = c0 + tl.arange(0, TB)
                partial = start + (k[:, None] * tiles + c[None, :]) * 3
                mask = (k < k_end)[:, None] & (c < tiles)[None, :]
                total += tl.sum(tl.load(partial, mask=mask, other=0), axis=1)
                weighted += tl.sum(tl.load(partial + 1, mask=mask, other=0), axis=1)
            mu, of_matrix = _mean_and_u2(total, weighted, m)
            tl.store(root_mu + k, tl.sqrt(mu), mask=k < k_end)
            per_matrix += of_matrix
        tl.store(out, tl.sum(u2) + tl.sum(per_matrix))
        tl.store(out + 2, tl.sum(check))


@triton.jit
def _count(record, applied, skipped):
    step = tl.load(record + _STEP).to(tl.pointer_type(tl.int64))
    tl.store(step, tl.load(step) + applied)
    tl.atomic_add(skipped, 1 - applied)


@triton.jit
def count(tensors, grads, updated, skipped):
    """t of a tensor that is updated; or one more that was left alone."""
    tensor = tl.program_id(0)
    if tl.load(grads + tensor) == 0:
        return
    _count(tensors + tensor.to(tl.int64) * _F, tl.load(updated + tensor), skipped)


@triton.jit
def _goes_on(record, total):
    """Whether a tensor is updated, and that as 0 or 1; ``total`` is not finite where g or g² is not."""
    goes_on = ((total - total) == 0) | ((tl.load(record + _FLAGS) & _SKIP) == 0)
    return goes_on, tl.where(goes_on, 1, 0).to(tl.int64)


@triton.jit
def _move_by(record, number, rho, decay_factor, u2, Q, s, slices, goes_on, applied):
    """How far slices move by their Σu² and Q: the factor of u, and alpha (eqs. 9 and 10). Records diagnostics."""
    flags, asked = tl.load(record + _FLAGS), tl.load(record + _DIAGNOSTICS)
    N = tl.load(record + _GLOBAL_SIZE).to(tl.float32)
    eps2, clip = tl.load(number + _EPS2).to(tl.float32), tl.load(number + _CLIP).to(tl.float32)
    beta1 = tl.load(number + _BETA1).to(tl.float32)
    rms_u = tl.sqrt(u2 / N)
    rms_x = tl.sqrt(Q / N)
    rms_x = rms_x * tl.where((flags & _AFTER_DECAY) != 0, tl.abs(decay_factor), 1.0)
    scale = tl.where((flags & _SCALE) != 0, tl.where(rms_x <= eps2, eps2, rms_x), 1.0)  # NaN stays NaN
    alpha = rho * scale  # eq. 9
    divisor = rms_u / clip
    divisor = tl.where(divisor <= 1, 1.0, divisor)
    divisor = tl.where(clip == _NONE, 1.0, divisor)
    factor = 1.0 / divisor  # eq. 10
    factor = tl.where((flags & _MAXIMIZE) != 0, -factor, factor)
    factor = factor * tl.where(beta1 > 0, 1.0 - beta1, alpha)
    reports = tl.where(asked != 0, slices, 0)
    made = tl.where(goes_on, reports, 0)
    out = asked.to(tl.pointer_type(tl.float64)) + s * 4
    tl.store(out, rms_u.to(tl.float64), mask=s < made)
    tl.store(out + 1, divisor.to(tl.float64), mask=s < made)
    tl.store(out + 2, scale.to(tl.float64), mask=s < made)
    left_alone = tl.load(out + 3, mask=s < reports, other=0) + (1 - applied).to(tl.float64)
    tl.store(out + 3, left_alone, mask=s < reports)
    return factor, alpha


@triton.jit
def finish(
    tensors, numbers, grads, scalars, slice_sums, moves, updated, skipped, BLOCK: tl.constexpr, COUNT: tl.constexpr
):
    """Whether a tensor is updated, and how far its slices move: the factor of u, and alpha (eqs. 9 and 10)."""
    tensor = tl.program_id(0)
    record, number = tensors + tensor.to(tl.int64) * _F, numbers + tensor.to(tl.int64) * _G
    first, slices = tl.load(record + _SLICE), tl.load(record + _SLICES)
    if (tl.load(grads + tensor) == 0) | (slices == 0):
        return
    rho, decay_factor = tl.load(scalars + tensor * 4 + 2), tl.load(scalars + tensor * 4 + 3)
    check = tl.zeros((BLOCK,), tl.float32)
    for s0 in range(0, slices, BLOCK):
        s = s0 + tl.arange(0, BLOCK)
        its, mask = slice_sums + (first + s) * 3, s < slices
        check += tl.load(its, mask=mask, other=0) + tl.load(its + 2, mask=mask, other=0)
    goes_on, applied = _goes_on(record, tl.sum(check))
    tl.store(updated + tensor, applied)
    for s0 in range(0, slices, BLOCK):
        s = s0 + tl.arange(0, BLOCK)
        its, mask = slice_sums + (first + s) * 3, s < slices
        u2, Q = tl.load(its, mask=mask, other=0), tl.load(its + 1, mask=mask, other=0)
        factor, alpha = _move_by(record, number, rho, decay_factor, u2, Q, s, slices, goes_on, applied)
        tl.store(moves + (first + s) * 2, factor, mask=mask)
        tl.store(moves + (first + s) * 2 + 1, alpha, mask=mask)
    if COUNT:
        _count(record, applied, skipped)


@triton.jit
def apply(
    tensors, numbers, grads, scalars, blocks, sums, roots, moves, updated, squares,
    K: tl.constexpr, NP: tl.constexpr, M: tl.constexpr, PARAM: tl.constexpr, GRAD: tl.constexpr,
    MOMENTUM: tl.constexpr, STOCHASTIC: tl.constexpr, COMPENSATED: tl.constexpr, HUGE: tl.constexpr,
    PART: tl.constexpr, TRANSPOSED: tl.constexpr, SQUARES: tl.constexpr, ALIGNED: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One part of K matrices, as in `measure`: writes their statistics, momentum and parameters (eqs. 12, 13).

    SQUARES: the sum of the new x² stays where the next step's measure would leave it (eq. 6).
    """
    tensor, matrix, part, chunk, _ = _block(blocks)
    address = tl.load(grads + tensor)
    if address == 0:
        return
    record = tensors + tensor * _F
    m, n, inner, matrices, parts, part_rows = _matrices(record, TRANSPOSED, ALIGNED)
    decay_factor = tl.load(scalars + tensor * 4 + 3)
    beta1 = tl.load(numbers + tensor * _G + _BETA1).to(tl.float32)
    grad = _pointer(address, GRAD, ALIGNED)
    param, momentum, scales, residual, seed, rng_stream, t = _target(record, PARAM, MOMENTUM, COMPENSATED, ALIGNED)
    row = tl.load(record + _FIRST).to(tl.pointer_type(tl.float32))
    column = _pointer(tl.load(record + _SECOND), tl.float32, ALIGNED)
    k = matrix + tl.arange(0, K)
    j = chunk * M + tl.arange(0, M)
    here = k < matrices
    first = k // inner * n * inner + k % inner
    slice_ = moves + (tl.load(record + _SLICE) + k // tl.load(record + _PER_SLICE)) * 2
    factor, alpha = tl.load(slice_, mask=here, other=0), tl.load(slice_ + 1, mask=here, other=0)
    known = here[:, None] & (j < m)[None, :]
    share = tl.load(record + _SUMS)
    if ALIGNED:
        share = tl.multiple_of(share, 16)
    c = tl.load(sums + share + k[:, None] * parts * m + j[None, :], mask=known, other=0)
    goes_on = tl.load(updated + tensor) != 0
    stores = tl.where(goes_on & (part == 0), m, 0)
    tl.store(column + k[:, None] * m + j[None, :], c, mask=here[:, None] & (j < stores)[None, :])
    root_mu = tl.load(roots + tl.load(record + _ROOT_MU) + k, mask=here, other=0)
    c = root_mu[:, None] * _inverse_root(c)
    end = tl.where(goes_on, tl.minimum((part + 1) * part_rows, n), 0)
    stores = tl.where(chunk == 0, n, 0)
    Q = tl.zeros((K,), tl.float32)
    for i0 in tl.range(part * part_rows, end, NP, num_stages=STAGES):
        i = i0 + tl.arange(0, NP)
        run = first[:, None] + i[None, :] * inner
        inside = here[:, None] & (i < n)[None, :]
        offset = _offsets(k, i, run, j, n, m, TRANSPOSED)
        mask = inside[:, :, None] & (j < m)[None, None, :]
        r = tl.load(sums + tl.load(record + _FINISHED) + run, mask=inside, other=0)
        tl.store(row + run, r, mask=here[:, None] & (i < stores)[None, :])
        a = _inverse_root(r) * factor[:, None]
        u = tl.load(grad + offset, mask=mask, other=0).to(tl.float32) * a[:, :, None] * c[:, None, :]
        numbered = offset
        if PART:
            if TRANSPOSED:
                before = k[:, None, None] * tl.load(record + _GLOBAL_COLUMNS) + tl.load(record + _ROW_OFFSET)
                numbered = (before + j[None, None, :]) * tl.load(record + _GLOBAL_ROWS) + i[None, :, None]
                numbered += tl.load(record + _COLUMN_OFFSET)
            else:
                numbered = _number(record, run, first[:, None] // (n * inner), n, inner)[:, :, None] + j[None, None, :]
        coded, coded_here = offset, mask
        if MOMENTUM == tl.int8:
            b = chunk * (M // _BLOCK) + tl.arange(0, M // _BLOCK)
            coded = tl.reshape(run[:, :, None] * (m // _BLOCK) + b[None, None, :], (K * NP * (M // _BLOCK),))
            coded_here = inside[:, :, None] & (b < m // _BLOCK)[None, None, :]
            coded_here = tl.reshape(coded_here, (K * NP * (M // _BLOCK),))
        x = move(
            param, momentum, scales, residual, offset, numbered, mask, coded, coded_here, u, decay_factor,
            alpha[:, None, None], beta1, seed, t, rng_stream,
            PARAM, MOMENTUM, STOCHASTIC, COMPENSATED, HUGE, K * NP * M,
        )  # fmt: skip
        if SQUARES:
            Q += tl.sum(tl.sum(x * x, axis=2), axis=1)
    if SQUARES:
        slot = (k * parts + part) * tl.load(record + _MOVED) + chunk
        tl.store(squares + tl.load(record + _SQUARES) + slot, Q, mask=k < tl.where(goes_on, matrices, 0))


@triton.jit
def apply_flat(
    tensors, numbers, grads, scalars, blocks, sums, roots, moves, updated, squares,
    BLOCK: tl.constexpr, FACTORED: tl.constexpr, SLICED: tl.constexpr, PARAM: tl.constexpr, GRAD: tl.constexpr,
    MOMENTUM: tl.constexpr, STOCHASTIC: tl.constexpr, COMPENSATED: tl.constexpr, HUGE: tl.constexpr,
    PART: tl.constexpr, SQUARES: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """One run of elements, for tensors that are not factored, and where blocks of 8-bit momentum cross rows."""
    tensor, start, end, index = _run(blocks, ALIGNED)
    address = tl.load(grads + tensor)
    if address == 0:
        return
    record = tensors + tensor * _F
    ema_weight, past, eps1 = _weights(scalars, numbers, tensor)
    decay_factor = tl.load(scalars + tensor * 4 + 3)
    beta1 = tl.load(numbers + tensor * _G + _BETA1).to(tl.float32)
    grad = _pointer(address, GRAD, ALIGNED)
    param, momentum, scales, residual, seed, rng_stream, t = _target(record, PARAM, MOMENTUM, COMPENSATED, ALIGNED)
    statistic = _pointer(tl.load(record + _FIRST), tl.float32, ALIGNED)
    column = tl.load(record + _SECOND).to(tl.pointer_type(tl.float32))
    m, n, inner, parts = (
        tl.load(record + _m), tl.load(record + _N), tl.load(record + _INNER), tl.load(record + _PARTS),
    )  # fmt: skip
    size, slice0, slice_size = tl.load(record + _SIZE), tl.load(record + _SLICE), tl.load(record + _SLICE_SIZE)
    goes_on = tl.load(updated + tensor) != 0
    end = tl.where(goes_on, tl.minimum(end, size), 0)
    if ALIGNED:
        end = tl.multiple_of(end, 16)
    Q = tl.zeros((BLOCK,), tl.float32)
    for first in range(start, end, BLOCK):
        local = tl.arange(0, BLOCK)
        e = first + local
        mask = e < end
        g = tl.load(grad + e, mask=mask, other=0).to(tl.float32)
        if SLICED:
            which, _ = _divide(first, local, slice_size, HUGE)
            slice_ = moves + (slice0 + which) * 2
            factor, alpha = tl.load(slice_, mask=mask, other=0), tl.load(slice_ + 1, mask=mask, other=0)
        else:
            factor, alpha = tl.load(moves + slice0 * 2), tl.load(moves + slice0 * 2 + 1)
        numbered = e
        if FACTORED:
            run, j = _divide(first, local, m, HUGE)
            b, rest = _divide(first - first, run, n * inner, HUGE)
            i, k = _divide(first - first, rest, inner, HUGE)
            k += b * inner
            r = tl.load(sums + tl.load(record + _FINISHED) + run, mask=mask, other=0)
            c = tl.load(sums + tl.load(record + _SUMS) + k * parts * m + j, mask=mask, other=0)
            tl.store(statistic + run, r, mask=mask & (j == 0))
            tl.store(column + k * m + j, c, mask=mask & (i == 0))
            root_mu = tl.load(roots + tl.load(record + _ROOT_MU) + k, mask=mask, other=0)
            u = g * (_inverse_root(r) * factor) * (root_mu * _inverse_root(c))
            if PART:
                numbered = _number(record, run, b, n, inner) + j
        else:
            v = _average(tl.load(statistic + e, mask=mask, other=0), g * g, ema_weight, past, eps1)  # eq. 11
            tl.store(statistic + e, v, mask=mask)
            u = g * _inverse_root(v) * factor
            if PART:
                run, j = _divide(first, local, slice_size, HUGE)
                numbered = _number(record, run, run, 1, 1) + j
        coded, coded_here = e, mask
        if MOMENTUM == tl.int8:
            coded = first // _BLOCK + tl.arange(0, BLOCK // _BLOCK)
            coded_here = coded * _BLOCK < end
        x = move(
            param, momentum, scales, residual, e, numbered, mask, coded, coded_here, u, decay_factor, alpha, beta1,
            seed, t, rng_stream, PARAM, MOMENTUM, STOCHASTIC, COMPENSATED, HUGE, BLOCK,
        )  # fmt: skip
        if SQUARES:
            Q += x * x
    if SQUARES:
        tl.store(squares + tl.load(record + _SQUARES) + index, tl.sum(Q), mask=goes_on)


@triton.jit
def on_chip(
    tensors, numbers, grads, scalars, blocks, squares, skipped,
    NP: tl.constexpr, M: tl.constexpr, FACTORED: tl.constexpr, PARAM: tl.constexpr, GRAD: tl.constexpr,
    MOMENTUM: tl.constexpr, STOCHASTIC: tl.constexpr, COMPENSATED: tl.constexpr, SCALE: tl.constexpr,
    ALIGNED: tl.constexpr,
):  # fmt: skip
    """The step of one tensor of NP × M elements at most. g is read once and stays in registers, x is moved once.

    SCALE: x is read for its sum of squares as well; else the last step has left that.
    """
    tensor, _, _, _, _ = _block(blocks)
    address = tl.load(grads + tensor)
    if address == 0:
        return
    record, number = tensors + tensor * _F, numbers + tensor * _G
    m, n, size = tl.load(record + _m), tl.load(record + _N), tl.load(record + _SIZE)
    if ALIGNED:
        m, size = tl.multiple_of(m, 16), tl.multiple_of(size, 16)
    ema_weight, past, eps1 = _weights(scalars, numbers, tensor)
    rho, decay_factor = tl.load(scalars + tensor * 4 + 2), tl.load(scalars + tensor * 4 + 3)
    beta1 = tl.load(number + _BETA1).to(tl.float32)
    grad = _pointer(address, GRAD, ALIGNED)
    param, momentum, scales, residual, seed, rng_stream, made = _target(record, PARAM, MOMENTUM, COMPENSATED, ALIGNED)
    first = tl.load(record + _FIRST).to(tl.pointer_type(tl.float32))
    column = tl.load(record + _SECOND).to(tl.pointer_type(tl.float32))
    i, j = tl.arange(0, NP), tl.arange(0, M)
    if FACTORED:
        offset = i[:, None] * m + j[None, :]
        mask = (i < n)[:, None] & (j < m)[None, :]
    else:
        offset = i[:, None].to(tl.int64) * M + j[None, :]
        mask = offset < size
    g = tl.load(grad + offset, mask=mask, other=0).to(tl.float32)
    g2 = g * g
    if FACTORED:
        S = tl.sum(g2, axis=0)  # eq. 4
        r, c = tl.load(first + i, mask=i < n, other=0), tl.load(column + j, mask=j < m, other=0)
        r = _average(r, tl.sum(g2, axis=1) / m.to(tl.float32), ema_weight, past, eps1)  # eq. 2
        c = tl.where(j < m, _average(c, S / n.to(tl.float32), ema_weight, past, eps1), 0.0)  # eq. 3
        u = g * _inverse_root(r)[:, None]
        W = tl.sum(u * u, axis=0)  # eq. 5
        mu, u2 = _mean_and_u2(tl.sum(c), tl.sum(tl.where(j < m, _weighted(W, c), 0.0)), m)
        check = tl.sum(S) + tl.sum(W)
        u = u * (tl.sqrt(mu) * _inverse_root(c))[None, :]
    else:
        v = _average(tl.load(first + offset, mask=mask, other=0), g2, ema_weight, past, eps1)  # eq. 11
        u = g * _inverse_root(v)
        u2 = tl.sum(tl.where(mask, u * u, 0.0))
        check = tl.sum(g2)
    left = squares + tl.load(record + _SQUARES)
    if SCALE:
        x = tl.load(param + offset, mask=mask, other=0).to(tl.float32)
        Q = tl.sum(x * x)  # eq. 6
    else:
        Q = tl.load(left)
    goes_on, applied = _goes_on(record, check + u2)
    only = tl.arange(0, 1)  # slice
    zero = only.to(tl.float32)
    factor, alpha = _move_by(record, number, rho, decay_factor, u2 + zero, Q + zero, only, 1, goes_on, applied)
    n, m, size = tl.where(goes_on, n, 0), tl.where(goes_on, m, 0), tl.where(goes_on, size, 0)
    if FACTORED:
        mask = (i < n)[:, None] & (j < m)[None, :]
        tl.store(first + i, r, mask=i < n)
        tl.store(column + j, c, mask=j < m)
    else:
        mask = offset < size
        tl.store(first + offset, v, mask=mask)
    coded, coded_here = offset, mask
    if MOMENTUM == tl.int8:  # a block of 256 neighbours in the tile is one in memory: see `on_chip` of the tables
        block = tl.arange(0, NP * M // _BLOCK) * _BLOCK
        if FACTORED:
            coded, coded_here = (block // M * m + block % M) // _BLOCK, (block // M < n) & (block % M < m)
        else:
            coded, coded_here = block // _BLOCK, block < size
    x = move(
        param, momentum, scales, residual, offset, offset, mask, coded, coded_here, u * tl.sum(factor), decay_factor,
        tl.sum(alpha), beta1, seed, made + 1, rng_stream, PARAM, MOMENTUM, STOCHASTIC, COMPENSATED, False, NP * M,
    )  # fmt: skip
    tl.store(left, tl.sum(x * x), mask=goes_on)
    _count(record, applied, skipped)
