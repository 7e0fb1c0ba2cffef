"""Measure where one process holds neither whole rows nor whole columns, or only some matrices of a stack.

The sum of u² (eq. 7) is then a sum over processes too, and the weights of eq. 5 wait for the finished rows: the
gradient is read twice, with a sum over processes after each read.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from adafactor.engine.torch.blocks import at, blocks, kept, reduced, total
from adafactor.engine.torch.eager import Sums, positive
from adafactor.engine.torch.work import Work, math_dtype


def first(w: Work) -> Sums:
    """Row sums in place of finished rows, column sums and Q: everything that a second read needs."""
    layout, scaled = w.layout, w.settings.hyperparameters.scale_parameter
    rows, S, Q = (_zeros(w, axes) for axes in (layout.columns, layout.rows, layout.whole))

    def visit(piece: tuple[slice, ...] | None, g: Tensor) -> None:
        squares = g * g
        at(rows, reduced(piece, layout.columns)).add_(total(squares, layout.columns))
        at(S, reduced(piece, layout.rows)).add_(total(squares, layout.rows))
        if scaled:
            x = at(w.param, piece).to(squares.dtype)
            at(Q, reduced(piece, layout.whole)).add_(total(x.mul(x), layout.whole))

    _read(w, visit)
    return Sums(rows, S, torch.zeros((), dtype=S.dtype, device=S.device), Q if scaled else None)


def second(w: Work, found: Sums, decay: Tensor) -> tuple[Tensor, Tensor]:
    """Finish the rows, whose sums are complete now, and read g again.

    Returns:
        Per matrix, Σ g²/(row column) and the sum of the columns, both as far as this process holds it.
    """
    layout, hp = w.layout, w.settings.hyperparameters
    assert found.rows is not None
    old = w.state["row"].view_as(found.rows)
    found.rows = torch.lerp(old, found.rows / layout.m + hp.epsilon_1, decay)  # eq. 2
    inverse = positive(found.rows).rsqrt_()
    W = _zeros(w, layout.rows)

    def visit(piece: tuple[slice, ...] | None, g: Tensor) -> None:
        # Divided before it is squared, as in `eager.measure`.
        weighted = (g * at(inverse, reduced(piece, layout.columns))).square_()
        at(W, reduced(piece, layout.rows)).add_(total(weighted, layout.rows))  # eq. 5

    _read(w, visit)
    column = columns(w, found, decay)
    return total(W / positive(column), layout.columns), total(column, layout.columns)


def columns(w: Work, found: Sums, decay: Tensor | float) -> Tensor:
    """The finished columns (eq. 3)."""
    assert found.S is not None
    old = w.state["column"].view_as(found.S)
    return torch.lerp(old, found.S / w.layout.n + w.settings.hyperparameters.epsilon_1, decay)


def squares_of_stack(w: Work, found: Sums, decay: Tensor | float) -> Tensor:
    """Σu² of the matrices that are here (eq. 7), per slice; their rows and columns are whole."""
    layout, column = w.layout, columns(w, found, decay)
    per_matrix = column.mean(layout.columns, keepdim=True) * total(found.W / positive(column), layout.columns)
    return total(per_matrix, layout.whole)


def _zeros(w: Work, axes: tuple[int, ...]) -> Tensor:
    return torch.zeros(kept(w.layout, axes), dtype=math_dtype(w.param.dtype), device=w.param.device)


def _read(w: Work, visit: Callable[[tuple[slice, ...] | None, Tensor], None]) -> None:
    """g piece by piece, in the dtype of the arithmetic."""
    if not w.layout.size:
        return
    for _, pieces in blocks(w):
        for piece in pieces:
            visit(piece, at(w.grad, piece).to(math_dtype(w.param.dtype)))
