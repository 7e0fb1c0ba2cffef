"""The native kernels under the PyTorch front end: a list of work becomes one table of descriptors and one call a verb.

A table is kept for as long as the same tensors come in the same order, so a step costs, besides the arithmetic,
the addresses of the gradients and a handful of numbers. Every address comes from a tensor that ``checks.py`` has
looked at since it last moved.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from functools import cache
from itertools import repeat
from operator import attrgetter, is_
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from adafactor.core import native
from adafactor.core.canonical import canonical
from adafactor.core.factoring import Layout, Part, Shape
from adafactor.engine.torch.blocks import kept
from adafactor.engine.torch.memory import addresses_of
from adafactor.engine.torch.work import MOST_UPDATES, Group, Settings, Sums, Work, math_dtype

_DTYPES = {getattr(torch, name): name for name in native.DTYPES}
_CODES = {getattr(torch, name): code for name, code in native.DTYPES.items()}
_dtype_of, _version_of = attrgetter("dtype"), attrgetter("_version")


@cache
def _use_openmp() -> bool:
    return native.use_openmp(torch._C.__file__)


class Native:
    """A list of work whose every tensor has a `form_of`. See `work.Backend`.

    Attributes:
        table: the descriptors.
        versions: of each parameter when ``table.Q`` was computed; -1 for not yet.
    """

    def __init__(self, work: Sequence[Work]) -> None:
        forms = [form_of(w) for w in work]
        self.work = work
        self.table = table = native.Table([form for form in forms if form is not None])
        assert len(table) == len(work)
        _use_openmp()
        self._params = [w.param for w in work]
        for k, w in enumerate(work):
            momentum = w.state.get("momentum") if w.settings.hyperparameters.momentum is not None else None
            table.bind(
                k,
                param=w.param.data_ptr(),
                param_dtype=_DTYPES[w.param.dtype],
                second_moment={name: w.state[name].data_ptr() for name in w.layout.slots},
                momentum=0 if momentum is None else momentum.data_ptr(),
                momentum_dtype="float32" if momentum is None else _DTYPES[momentum.dtype],
                residual=w.state["residual"].data_ptr() if w.compensated else 0,
            )
            if isinstance(w.layout, Part):
                globalise(table.records[k : k + 1], in_memory(w.layout, table.forms[k]))
        table.records["rng_stream"] = [w.rng_stream for w in work]
        table.records["count"] = [w.state["step"].data_ptr() for w in work]
        table.records["diagnostics"] = [0 if w.diagnostics is None else w.diagnostics.data_ptr() for w in work]
        self._groups = _Groups(work)
        self._versions: list[int] = [-1] * len(work)
        self._dtypes: list[torch.dtype | None] = [None] * len(work)  # of the gradients that the table knows
        self._counts = [w.state["step"] for w in work]
        self._reread = np.array([w.layout.cut == "both" for w in work])
        self._sums: list[Sums] | None = None

    def counts(self) -> bool:
        return bool(((t := self.table.number()) > 0).all() and (t <= MOST_UPDATES).all())

    def step(self, grads: Sequence[Tensor | None], skipped: Tensor) -> None:
        here = None
        if any(map(is_, grads, repeat(None))):
            here = np.flatnonzero([grad is not None for grad in grads])
        before = list(map(_version_of, self._params))
        self._begin(grads, before == self._versions or np.equal(before, self._versions))
        self.table.run("step", torch.get_num_threads(), chosen=here)
        self._count(skipped, here)
        after = [version + 1 for version in before]
        if here is not None:  # Q of the others is of the x that they were left with
            after = [
                new if grad is not None else old for new, old, grad in zip(after, self._versions, grads, strict=True)
            ]
        self._versions = after  # views of one tensor count for each other, and so are looked at every time

    def measure(self, grads: Sequence[Tensor]) -> list[Sums]:
        if self._sums is None:
            self.table.allocate_sums()
            self._sums = _views(self)
        self._begin(grads, False)
        self.table.flag(native.ROWS_SUMMED | native.MATRIX_SUMS | native.TOTALS, False)
        self.table.flag(native.ROW_SUMS, self._reread)
        self.table.measure(torch.get_num_threads())
        for sums in self._sums:
            sums.mu = sums.u2 = sums.nonfinite = None
        return self._sums

    def measure_again(self) -> None:
        chosen = np.flatnonzero(self._reread)
        if len(chosen):
            self.table.flag(native.ROW_SUMS, False)
            self.table.flag(native.ROWS_SUMMED, self._reread)
            self.table.run("measure", torch.get_num_threads(), chosen=chosen)

    def finish_columns(self, places: Sequence[int]) -> None:
        chosen = np.array([k for k in places if self.work[k].layout.factored], np.int64)
        if not len(chosen):
            return
        asked = np.zeros(len(self.work), bool)
        asked[chosen] = True
        self.table.flag(native.MATRIX_SUMS, asked)
        self.table.run("finish", torch.get_num_threads(), chosen=chosen)
        self.table.flag(native.MATRIX_SUMS, False)
        assert self._sums is not None
        for k in chosen.tolist():
            sums, layout = self._sums[k], self.work[k].layout
            shape = kept(layout, (*layout.rows, *layout.columns))
            columns, weighted = torch.from_numpy(self.table.totals["matrix_sums"][k].reshape(-1, 2).copy()).unbind(1)
            sums.columns, sums.weighted = columns.view(shape), weighted.view(shape)

    def finish(self) -> None:
        assert self._sums is not None
        totals = np.array([sums.columns is not None for sums in self._sums])
        for k in np.flatnonzero(totals).tolist():
            sums, layout = self._sums[k], self.work[k].layout
            assert sums.columns is not None
            assert sums.weighted is not None
            mu = sums.columns / layout.m if sums.mu is None else sums.mu
            u2 = (mu * sums.weighted).sum(layout.whole) if sums.u2 is None else sums.u2
            self.table.totals["mu"][k][...] = mu.reshape(-1).numpy()
            self.table.totals["u2"][k][...] = u2.reshape(-1).numpy()
            sums.columns = sums.weighted = None
        self.table.flag(native.TOTALS, totals)
        self.table.finish(torch.get_num_threads())

    def apply(self, skipped: Tensor, absent: Container[int] = ()) -> None:
        here = np.array([k for k in range(len(self.work)) if k not in absent], np.int64) if absent else None
        self.table.run("apply", torch.get_num_threads(), chosen=here)
        self._count(skipped, here)

    def release(self) -> None:
        """The table holds addresses, not tensors."""

    def _begin(self, grads: Sequence[Tensor | None], known: bool | NDArray[np.bool_]) -> None:
        """Hand over the gradients and the numbers of this update; ``known``: whose ``table.Q`` is still true."""
        record = self.table.records
        record["grad"], dtypes = addresses_of(grads), dtypes_of(grads, self._dtypes)
        if dtypes != self._dtypes:
            record["grad_dtype"], self._dtypes = [_CODES.get(dtype, 0) for dtype in dtypes], dtypes
        self._groups.configure(self.table)
        t = self.table.number()
        self.table.begin(t, *self._groups.numbers(t), known)

    def _count(self, skipped: Tensor, here: NDArray[np.int64] | None = None) -> None:
        """Tell autograd what was written, and the user what was left alone."""
        for tensors in (self._params, self._counts):
            torch.autograd.graph.increment_version(tensors if here is None else [tensors[k] for k in here])
        left_alone = int(self.table.skipped[slice(None) if here is None else here].sum())
        if left_alone:
            skipped.add_(left_alone)


def dtypes_of(grads: Sequence[Tensor | None], last: list[torch.dtype | None]) -> list[torch.dtype | None]:
    """Their dtypes; the last known of those that are not there."""
    if any(map(is_, grads, repeat(None))):
        return [old if grad is None else grad.dtype for grad, old in zip(grads, last, strict=True)]
    return list(map(_dtype_of, grads))


class _Groups:
    """The numbers of a table's groups, tensor by tensor."""

    def __init__(self, work: Sequence[Work]) -> None:
        self._groups: list[Group] = []
        lengths: list[int] = []
        for w in work:
            if not self._groups or self._groups[-1] is not w.group:
                self._groups.append(w.group)
                lengths.append(0)
            lengths[-1] += 1
        self._lengths = np.array(lengths, np.int64)
        self._settings: list[Settings | None] = [None] * len(lengths)

    def configure(self, table: native.Table) -> None:
        """Hand over what groups say, where it has changed."""
        settings = [group.settings for group in self._groups]
        if all(new is old for new, old in zip(settings, self._settings, strict=True)):
            return
        first = 0
        for k, length in enumerate(self._lengths.tolist()):
            said = settings[k]
            if said is not self._settings[k]:
                flags = native.SCALE_AFTER_DECAY * said.scale_after_decay + native.MAXIMIZE * said.maximize
                flags += native.SKIP_NONFINITE * said.skip_nonfinite
                flags += native.STOCHASTIC_ROUNDING * said.stochastic_rounding
                table.configure(said.hyperparameters, slice(first, first + length), flags=flags, seed=said.seed)
            first += length
        self._settings = list(settings)
        every = self._lengths
        self._caps = np.repeat([said.hyperparameters.caps(said.scheduled) for said in settings], every)
        self._weight_decay = np.repeat([float(said.weight_decay) for said in settings], every)
        # Equation 1 is Python's own power, once for every pair of t and exponent: all ways of running share its bits.
        self._curves: list[Callable[[int], float]] = []
        known: dict[tuple[float, float | None], int] = {}
        curves = []
        for said in settings:
            hp = said.hyperparameters
            key = (hp.beta_2_decay, hp.beta_2_max)
            if key not in known:
                known[key] = len(self._curves)
                self._curves.append(hp.decay)
            curves.append(known[key])
        self._curve = np.repeat(curves, every)

    def numbers(self, t: NDArray[np.int64]) -> tuple[Any, NDArray[np.float64], NDArray[np.float64]]:
        """1 - beta(t) (eq. 1), rho(t) (eq. 8) and what weight decay multiplies x by, of every tensor."""
        lr = np.repeat(np.array([float(group.lr) for group in self._groups]), self._lengths)
        rho = np.where(self._caps, np.minimum(lr, 1.0 / np.sqrt(t)), lr)
        decay_factor = 1.0 - lr * self._weight_decay
        if len(self._curves) == 1 and (t == t[0]).all():
            return self._curves[0](int(t[0])), rho, decay_factor
        pairs, inverse = np.unique(np.stack([self._curve, t]), axis=1, return_inverse=True)
        values = np.array([self._curves[curve](step) for curve, step in pairs.T.tolist()])
        return values[inverse.reshape(-1)], rho, decay_factor


def _views(backend: Native) -> list[Sums]:
    """The table's own sums as tensors: what is written there is what finish reads."""
    table, views = backend.table, []
    flat = {name: torch.from_numpy(sums) for name, sums in table.sums.items()}
    rows = {name: torch.from_numpy(finished) for name, finished in table.finished.items()}
    first = dict.fromkeys(flat, (0, 0))
    for k, w in enumerate(backend.work):
        layout, form = w.layout, table.forms[k]
        dtype = "float64" if math_dtype(w.param.dtype) == torch.float64 else "float32"
        at, at_rows = first[dtype]
        half = len(flat[dtype]) // 2
        over = layout.rows if layout.factored else layout.whole
        S, W = (flat[dtype][start : start + form.sums_size].view(kept(layout, over)) for start in (at, half + at))
        finished = rows[dtype][at_rows : at_rows + form.finished_size] if layout.factored else None
        first[dtype] = at + form.sums_size, at_rows + form.finished_size
        Q = torch.from_numpy(table.Q[k]).view(kept(layout, layout.whole))
        views.append(
            Sums(
                None if finished is None else finished.view(kept(layout, layout.columns)),
                S if layout.factored else None,
                W,
                Q if w.settings.hyperparameters.scale_parameter else None,
            )
        )
    return views


def in_memory(part: Part, form: native.Canonical) -> Part:
    """The part with the kernel's rows as its rows."""
    return part.transposed if form.transposed else part


def globalise(record: NDArray[Any], part: Part) -> None:
    """The numbers of the whole parameter for a table row that holds a part of it."""
    record["global_rows"] = part.n if part.factored else 1
    record["global_columns"] = part.m if part.factored else part.slice_size
    record["global_size"] = part.slice_size

    def first(axes: Sequence[int]) -> int:
        place = 0
        for axis in axes:
            place = place * part.whole_shape[axis] + part.offset[axis]
        return place

    if part.factored:  # in front of the rows stand those of the matrices that other processes hold
        record["row_offset"] = first(part.rows) + first(range(min(part.rows))) * part.n
        record["column_offset"] = first(part.columns)
    else:
        record["row_offset"] = first(part.batch)
        record["column_offset"] = first(part.whole)


def is_numbered(part: Part) -> bool:
    """Whether an offset is enough to number the elements: every role is split along its leading axis at most."""
    stack = tuple(axis for axis in range(len(part.shape)) if axis not in (*part.rows, *part.columns, *part.batch))
    sides: tuple[Shape, ...] = (stack, part.rows, part.columns) if part.factored else (part.whole,)
    lengths = list(zip(part.shape, part.whole_shape, strict=True))
    split = [axis for axis, (here, whole) in enumerate(lengths) if here != whole]
    if any(axis in split for axes in (part.batch, *sides) for axis in axes[1:]):
        return False
    if not part.factored:
        return True
    # Columns that stand before their rows, matrices of a stack inside one another (`inner` of the kernels' form), or
    # a split stack behind a batch leave gaps.
    first, last = min(part.rows), max(part.rows)
    in_order = last < min(part.columns) and all(axis < first for axis in (*stack, *part.batch))
    return in_order and not (part.batch and any(axis in split for axis in stack))


def form_of(w: Work) -> native.Canonical | None:
    """The kernels' form of a tensor, or ``None`` where only ``eager.py`` can update it."""
    dense = [w.param, *(w.state[name] for name in ("momentum", "residual") if name in w.slots)]
    if not all(tensor.is_contiguous() for tensor in dense) or any(tensor.dtype == torch.int8 for tensor in dense):
        return None
    layout: Layout = w.layout
    form = canonical(layout)
    if form is None or not isinstance(layout, Part):
        return form
    if not layout.size:
        return None
    if w.settings.stochastic_rounding and not is_numbered(in_memory(layout, form)):
        return None
    if not form.transposed:
        return form
    # A part's rows are whole and its columns may not be: its rows, the kernel's columns, are what measure must finish.
    return form._replace(columns_first=True) if form.inner == 1 and layout.cut != "both" else None
