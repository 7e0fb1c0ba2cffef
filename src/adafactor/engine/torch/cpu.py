"""The native kernels under the PyTorch front end: a list of work becomes one table of descriptors and one call.

A table is kept for as long as the same parameters come in the same order, so a step costs, besides the arithmetic,
the addresses of the gradients and a handful of numbers per group. What has no form that the kernels know (a
channels-last gradient beside a contiguous parameter, rows between columns) goes to ``eager.py``, tensor by tensor.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from adafactor.core import native
from adafactor.core.factoring import Part
from adafactor.engine.torch import eager
from adafactor.engine.torch.work import Work

_DTYPES = {getattr(torch, name): name for name in native.DTYPES}
_CODES = {getattr(torch, name): code for name, code in native.DTYPES.items()}


class Step:
    """The kernel ``step(work, skipped)`` for CPU tensors, with the tables of the last ``lists`` lists or fewer."""

    def __init__(self, lists: int = 8) -> None:
        self._lists = lists
        self._tables: dict[tuple[int, ...], Prepared] = {}

    def __call__(self, work: Sequence[Work], skipped: Tensor) -> None:
        """One update of every parameter in ``work``, in place; see ``work.py``."""
        grads = [w.grad for w in work]
        if not all(map(Tensor.is_contiguous, grads)):
            other = [w for w in work if not w.grad.is_contiguous()]
            eager.step(other, skipped)
            work = [w for w in work if w.grad.is_contiguous()]
            grads = [w.grad for w in work]
        key = tuple(map(id, work))
        prepared = self._tables.get(key)
        if prepared is None or prepared.stale():
            if len(self._tables) >= self._lists:  # a model whose list changes every step must not fill the memory
                self._tables.clear()
            prepared = self._tables[key] = prepare(work)
        if prepared.other:
            eager.step(prepared.other, skipped)
            grads = [w.grad for w in prepared.work]
        if prepared.work:
            prepared.step(grads, skipped)


@dataclass(eq=False)
class Prepared:
    """A table and the tensors behind its addresses.

    Attributes:
        work: what the table holds, in its order; ``other``: what it cannot hold.
        versions: of each parameter when ``table.Q`` was computed; -1 for not yet.
    """

    work: list[Work]
    other: list[Work]
    table: native.Table
    params: list[Tensor]
    addresses: list[list[int]]
    versions: list[int] = field(default_factory=list)

    def stale(self) -> bool:
        """Whether a parameter or a statistic has got other memory since (``param.data = ...``, a loaded state)."""
        return _addresses(self.work) != self.addresses

    def step(self, grads: list[Tensor], skipped: Tensor) -> None:
        known = np.array([p._version for p in self.params]) == self.versions
        self.begin(grads, known)
        self.table.step(torch.get_num_threads())
        self.finish(skipped)
        self.versions = [p._version for p in self.params]

    def begin(self, grads: Sequence[Tensor], known: NDArray[np.bool_]) -> None:
        """Hand over the gradients and the numbers of this update; ``known``: whose ``table.Q`` is still true."""
        record = self.table.records
        record["grad"] = [g.data_ptr() for g in grads]
        record["grad_dtype"] = [_CODES[g.dtype] for g in grads]
        t = torch.stack([w.state["step"] for w in self.work]).numpy() + 1
        first = 0
        for _, run in groupby(self.work, lambda w: (id(w.settings), id(w.lr))):
            members = list(run)
            where = slice(first, first + len(members))
            first = where.stop
            self._configure(members[0], where, t[where], known[where])

    def finish(self, skipped: Tensor) -> None:
        """Count the update of every tensor that was not left alone."""
        torch.autograd.graph.increment_version(self.params)
        steps = [w.state["step"] for w in self.work]
        left_alone = self.table.skipped
        if left_alone.any():
            skipped.add_(int(left_alone.sum()))
            steps = [step for step, alone in zip(steps, left_alone.tolist(), strict=True) if not alone]
        if steps:
            torch._foreach_add_(steps, 1)

    def _configure(self, w: Work, where: slice, t: NDArray[np.int64], known: NDArray[np.bool_]) -> None:
        settings, lr = w.settings, float(w.lr)
        hp = settings.hyperparameters
        same = bool((t == t[0]).all())
        rho: float | NDArray[np.float64] = (
            hp.rho(lr, int(t[0]), settings.scheduled)
            if same
            else np.array([hp.rho(lr, int(s), settings.scheduled) for s in t])
        )
        self.table.configure(
            hp,
            int(t[0]) if same else t,
            rho,  # type: ignore[arg-type]
            where,
            decay_factor=1.0 - lr * settings.weight_decay,
            scale_after_decay=settings.scale_after_decay,
            maximize=settings.maximize,
            skip_nonfinite=settings.skip_nonfinite,
            stochastic_rounding=settings.stochastic_rounding,
            q_known=known,
            seed=settings.seed,
        )


def prepare(work: Sequence[Work]) -> Prepared:
    """A table of what the kernels can take, and a list of what they cannot."""
    forms = [form_of(w) for w in work]
    chosen = [w for w, form in zip(work, forms, strict=True) if form is not None]
    table = native.Table([form for form in forms if form is not None])
    for k, w in enumerate(chosen):
        momentum = w.state.get("momentum")
        table.place(
            k,
            param=w.param.data_ptr(),
            param_dtype=_DTYPES[w.param.dtype],
            second_moment={name: w.state[name].data_ptr() for name in w.layout.slots},
            momentum=0 if momentum is None else momentum.data_ptr(),
            momentum_dtype="float32" if momentum is None else _DTYPES[momentum.dtype],
            residual=w.state["residual"].data_ptr() if w.compensated else 0,
        )
        if isinstance(w.layout, Part):
            _globalise(table.records[k : k + 1], _in_memory(w.layout, table.forms[k]))
    table.records["rng_stream"] = [w.tensor for w in chosen]
    table.records["diagnostics"] = [0 if w.report is None else w.report.data_ptr() for w in chosen]
    return Prepared(
        work=chosen,
        other=[w for w, form in zip(work, forms, strict=True) if form is None],
        table=table,
        params=[w.param for w in chosen],
        addresses=_addresses(chosen),
        versions=[-1] * len(chosen),
    )


def _in_memory(part: Part, form: native.Canonical) -> Part:
    """The part with the kernel's rows as its rows."""
    return part.transposed if form.transposed else part


def _globalise(record: NDArray[Any], part: Part) -> None:
    """The numbers of the whole parameter for a table row that holds a part of it."""
    whole, offset = part.whole_shape, part.offset
    record["global_rows"] = part.n if part.factored else 1
    record["global_columns"] = part.m if part.factored else part.slice_size
    record["global_size"] = part.slice_size

    def first(axes: Sequence[int]) -> int:
        place = 0
        for axis in axes:
            place = place * whole[axis] + offset[axis]
        return place

    if part.factored:  # in front of the rows stand those of the matrices that other processes hold
        record["row_offset"] = first(part.rows) + first(range(min(part.rows))) * part.n
        record["column_offset"] = first(part.columns)
    else:
        record["row_offset"] = first(part.batch)
        record["column_offset"] = first(part.whole)


def _numbered(part: Part) -> bool:
    """Whether an offset is enough to number the elements: every role is split along its leading axis at most."""
    stack = tuple(axis for axis in range(len(part.shape)) if axis not in (*part.rows, *part.columns, *part.batch))
    roles = (part.batch, stack, part.rows, part.columns) if part.factored else (part.batch, part.whole)
    lengths = list(zip(part.shape, part.whole_shape, strict=True))
    split = [axis for axis, (here, whole) in enumerate(lengths) if here != whole]
    if any(axis in split for axes in roles for axis in axes[1:]):
        return False
    if not part.factored:
        return True
    # Columns that stand before their rows, matrices of a stack inside one another (`inner` of the kernels' form), or
    # a split stack behind a batch leave gaps.
    first, last = min(part.rows), max(part.rows)
    in_order = last < min(part.columns) and all(axis < first for axis in (*stack, *part.batch))
    return in_order and not (part.batch and any(axis in split for axis in stack))


def _addresses(work: Sequence[Work]) -> list[list[int]]:
    states = [w.state for w in work]
    lists = [[w.param.data_ptr() for w in work]]
    for name in ("row", "column", "second_moment", "momentum"):
        lists.append([state[name].data_ptr() for state in states if name in state])
    lists.append([w.state["residual"].data_ptr() for w in work if w.compensated])
    return lists


def form_of(w: Work) -> native.Canonical | None:
    """The kernels' form of a tensor, or ``None`` where only ``eager.py`` can update it."""
    momentum = w.state.get("momentum")
    if not w.param.is_contiguous() or (momentum is not None and not momentum.is_contiguous()):
        return None
    if momentum is not None and momentum.dtype == torch.int8:
        return None
    if w.compensated and not w.state["residual"].is_contiguous():
        return None
    form = native.canonical(w.layout)
    if form is None or not isinstance(w.layout, Part):
        return form
    if w.settings.stochastic_rounding and not _numbered(_in_memory(w.layout, form)):
        return None
    if not form.transposed:
        return form
    # A part's rows are whole and its columns may not be: its rows, the kernel's columns, are what measure must finish.
    return form._replace(columns_first=True) if form.inner == 1 else None
