"""The Triton kernels under the PyTorch front end: a list of work becomes tables on the device and a few launches.

A step costs the host the addresses of the gradients, one copy to the device where these or a learning rate have
changed, and about ten launches whatever the number of tensors. Nothing waits for the device, and all of it can be
captured in a CUDA graph. What has no form that the kernels know, and float64, goes to ``eager.py``, tensor by tensor.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Container, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache, partial
from operator import attrgetter, is_
from typing import Any, NamedTuple, cast
from weakref import WeakValueDictionary

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from adafactor.core.canonical import Canonical, canonical
from adafactor.core.factoring import Cut, Part
from adafactor.engine.torch import triton_table
from adafactor.engine.torch.blocks import kept
from adafactor.engine.torch.cpu import _globalise, _in_memory, _numbered, dtypes_of
from adafactor.engine.torch.int8 import BLOCK
from adafactor.engine.torch.memory import addresses_of
from adafactor.engine.torch.triton_table import FIELDS, FLAGS, NUMBERS, Launch, Tables
from adafactor.engine.torch.work import Sums, Work

_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16", torch.float64: "float64"}
_NAMES[torch.int8] = "int8"
_SIZES = {name: dtype.itemsize for dtype, name in _NAMES.items()}
_PLACE = {name: place for place, name in enumerate(FIELDS)}
_BACKENDS = {"cuda": "amd" if torch.version.hip else "nvidia", "xpu": "intel"}
_dtype_of, _version_of = attrgetter("dtype"), attrgetter("_version")

# Every so many steps Σx² (eq. 6) is taken from the parameters again, whatever their version counters say.
REMEASURE = 64


@cache
def why_not(device: torch.device) -> str | None:
    """One sentence that says why Triton kernels cannot run on a device, or ``None`` where they can."""
    kind = device.type
    if kind not in _BACKENDS:
        return f"The Triton kernels are for {' and '.join(_BACKENDS)} tensors, not for {kind} tensors."
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed; the CUDA builds of PyTorch bring it along, or pip install triton."
    module = torch.get_device_module(device)
    if not module.is_available():
        none = kind == "cuda" and torch.version.cuda is None and torch.version.hip is None
        return "This build of PyTorch has no CUDA." if none else f"There is no {kind} device."
    if importlib.util.find_spec(f"triton.backends.{_BACKENDS[kind]}") is None:
        return f"The Triton that is installed has no part for {kind} devices."
    if kind == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device) < (7, 0):
        return f"Triton needs compute capability 7.0 or later, and {torch.cuda.get_device_name(device)} has less."
    if kind == "xpu" and not torch.xpu.get_device_capability(device).get("has_fp64", False):
        return "The Triton kernels count in float64, which this xpu device does not have."
    return None


def device_of(device: torch.device) -> AbstractContextManager[object]:
    """Triton launches on the current device."""
    context: AbstractContextManager[object] = nullcontext()
    return context if device.type == "cpu" else torch.get_device_module(device).device(device)


def is_capturing() -> bool:
    """Whether the current stream of the accelerator is being captured in a graph."""
    module = _accelerator()
    return module is not None and module.is_initialized() and module.is_current_stream_capturing()


@cache
def _accelerator() -> Any:
    """The module of the accelerator whose streams can be captured, where there is one."""
    kind = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    module = None if kind is None else torch.get_device_module(kind)
    return module if hasattr(module, "is_current_stream_capturing") else None


@cache
def _lanes(device: torch.device) -> int:
    """Threads of a warp: 64 on the data-center devices of AMD, else 32."""
    if device.type != "cuda":
        return 32
    return int(getattr(torch.cuda.get_device_properties(device), "warp_size", 32))


@cache
def _shared(device: torch.device) -> int:
    """Bytes of shared memory that a program may have; 99 KB is the least of compute capability 8.0 and later."""
    if device.type != "cuda":
        return 99 * 1024
    return int(getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin", 99 * 1024))


def send(target: Tensor, source: Tensor) -> None:
    """Copy without waiting. A captured copy reads its source again at every replay."""
    target.copy_(source, non_blocking=True)


def pinned(array: NDArray[Any], device: torch.device) -> Tensor:
    """A copy of an array that a device can read while the host goes on."""
    source = torch.from_numpy(array)
    return source.clone() if device.type == "cpu" else source.pin_memory()


# What captured steps read, by the optimizer's counter of skipped tensors, which they write: neither a change of groups
# or of the state nor other lists of gradients may free it. What a capture itself allocates belongs to its graph.
_captured: Any = WeakIdKeyDictionary()


class Scratch:
    """A buffer that lives as long as anybody who used it last."""

    def __init__(self, buffer: Tensor) -> None:
        self.buffer = buffer


_scratch: WeakValueDictionary[tuple[torch.device, object], Scratch] = WeakValueDictionary()


class Place(NamedTuple):
    """Where the sums of a factored tensor are, as views: what `columns` leaves of each matrix and tile among them."""

    rows: Tensor
    row_sums: Tensor
    S: Tensor
    partials: Tensor
    root_mu: Tensor


class Triton:
    """A list of work whose every tensor has a `form_of`: its tables on the device, and the buffers between kernels.

    Gradients are arguments; ``None`` is a tensor without one, which is left alone.

    Attributes:
        records, numbers: the tables, complete; ``plan``: what they were made from.
        versions: of each parameter when apply left its Σx² (eq. 6) in ``squares``. Those of views of one tensor, which
            count for each other, are taken as lower than they are: their x is read at every step.
    """

    def __init__(self, work: Sequence[Work]) -> None:
        self.work = work
        self._params = [w.param for w in work]
        self.device = work[0].param.device
        self._aligned = np.ones(len(work), bool)
        self._dtypes: list[Any] = [w.param.dtype for w in work]
        self._absent: set[int] = set()
        self._sums: list[Sums] | None = None
        self._places: dict[int, Place] = {}
        self._cut_both: list[tuple[Any, Place]] = []
        self._unfinished: set[Cut | None] = set()
        self._reserve: Tensor | None = None
        self._at_once = True  # the verbs are not called one by one
        self._recorded: list[Tensor] = []  # what a capture in progress has made
        self._streams: set[object] = set()
        self._build()

    # ---- tables

    def counts(self) -> bool:
        return True

    def _build(self) -> None:
        work, device = self.work, self.device
        self._of_graph = is_capturing()  # its uploads wait for a replay: no eager step may read these tables
        forms = [form_of(w) for w in work]
        self._described = [
            triton_table.Tensor(_in_kernel(form), launch_of(w, form, dtype, aligned, self._at_once))
            for w, form, dtype, aligned in zip(work, forms, self._dtypes, self._aligned, strict=True)
            if form is not None
        ]
        self.plan = plan = triton_table.tables(self._described)
        groups = list({id(w.group): w.group for w in work}.values())
        self._lrs = {id(group): place for place, group in enumerate(groups)}  # places of learning rates
        self._groups, self._settings = groups, [group.settings for group in groups]
        numbers = self._fill(plan)
        self._kept: list[Tensor] = []  # all that lives on the device

        def upload(array: NDArray[Any]) -> Tensor:
            source = pinned(array, device)
            target = buffer(array.size, source.dtype)[: array.size].view(source.shape)
            send(target, source)
            self._kept.append(source)
            return target

        def buffer(size: int, dtype: torch.dtype = torch.float32) -> Tensor:
            made = torch.empty(max(size, 1), dtype=dtype, device=device)
            self._kept.append(made)
            return made

        self.records, self.numbers, self.slices = upload(plan.records), upload(numbers), upload(plan.slices)
        self.measured = {launch: upload(blocks) for launch, blocks in plan.measure.items()}
        self.applied = {launch: upload(blocks) for launch, blocks in plan.apply.items()}
        self.columns = {key: upload(blocks) for key, blocks in plan.columns.items()}
        self.held = {launch: upload(blocks) for launch, blocks in plan.on_chip.items()}
        self._cuts = {key[3] for key in plan.columns}
        count = len(work)
        self.scalars, self.updated = buffer(4 * count), buffer(count, torch.int64)
        self.partials, self.squares = buffer(3 * plan.partials), buffer(plan.squares)
        self.roots, self.found = buffer(plan.roots), buffer(3 * len(plan.slices))
        self.moves = buffer(2 * len(plan.slices))
        self.varying = buffer(count + len(groups), torch.int64)  # addresses of gradients, then learning rates
        self.sent: tuple[bytes, list[float]] | None = None  # what it holds
        self._versions: list[int] | None = None
        self._before: list[int] | None = None  # what they are in a step
        self._all_known = frozenset(launch for launch in plan.members if launch.keeps_squares)
        self._steps = 0
        self._told: tuple[object, ...] = ()  # to the launches of the last step
        self._sums = None

    def _fill(self, plan: Tables) -> NDArray[np.float64]:
        """Complete the records with addresses and what the user has said; returns the numbers."""
        numbers = np.zeros((len(self.work), len(NUMBERS)))
        for k, (w, tensor) in enumerate(zip(self.work, self._described, strict=True)):
            form, state, settings = tensor.form, w.state, w.settings
            hp, record = settings.hyperparameters, plan.records[k]
            first, second = form.slots
            said: dict[str, int] = {
                "param": w.param.data_ptr(),
                "first": state[first].data_ptr(),
                "second": state[second].data_ptr() if second else 0,
                "momentum": state["momentum"].data_ptr() if hp.momentum is not None else 0,
                "scales": state["momentum_scale"].data_ptr() if "momentum_scale" in w.slots else 0,
                "residual": state["residual"].data_ptr() if w.compensated else 0,
                "diagnostics": 0 if w.diagnostics is None else w.diagnostics.data_ptr(),
                "step": state["step"].data_ptr(),
                "lr": self._lrs[id(w.group)],
                "seed": settings.seed - (1 << 64 if settings.seed >> 63 else 0),
                "rng_stream": w.rng_stream,
            }
            if isinstance(w.layout, Part):
                swapped = tensor.launch.transposed
                _globalise(cast(Any, said), w.layout.transposed if form.transposed or swapped else w.layout)
                if swapped:
                    said["global_rows"], said["global_columns"] = said["global_columns"], said["global_rows"]
            flags = (
                hp.caps(settings.scheduled),
                hp.scale_parameter,
                settings.scale_after_decay,
                settings.maximize,
                settings.skip_nonfinite,
            )
            said["flags"] = sum(flag << bit for bit, flag in enumerate(flags))
            assert len(flags) == len(FLAGS)
            for name, value in said.items():
                record[_PLACE[name]] = value
            numbers[k] = (
                hp.beta_2_decay,
                0.0 if hp.beta_2_max is None else 1.0 - hp.beta_2_max,
                hp.epsilon_1,
                hp.epsilon_2,
                triton_table.NO_CLIP if hp.clip_threshold is None else hp.clip_threshold,
                settings.weight_decay,
                hp.momentum or 0.0,
            )
        return numbers

    # ---- one step

    def step(self, grads: Sequence[Tensor | None], skipped: Tensor) -> None:
        """One update of everything. Launches only; what they find decides on the device."""
        with device_of(self.device):
            varying = self._begin(grads)
            sums = self._own() if is_capturing() else self._shared()
            told = varying, sums, skipped, self._known(skipped)
            if len(told) != len(self._told) or not all(map(is_, told, self._told)):
                self.sums = sums
                self._step, self._told = self._launches_of_step(varying, skipped, told[3]), told
            for launch in self._step:
                launch()
        self._wrote(skipped)

    def _launches_of_step(
        self, varying: Tensor, skipped: Tensor, known: Container[Launch]
    ) -> list[Callable[[], object]]:
        launches = Launches(self, varying)
        launches.measure(known)
        launches.on_chip(known, skipped)
        for cut in self._cuts:
            launches.columns(cut, totals=False)
        if len(self.plan.slices):
            launches.slices(measured=True, finished=True)
            launches.finish(skipped, count=True)
        launches.apply()
        return launches.queue

    def measure(self, grads: Sequence[Tensor | None]) -> list[Sums]:
        """Equations 2, 4, 5, 6 and 11. What is written to the sums is what `finish` reads."""
        with device_of(self.device):
            if self._at_once:
                self._at_once = False
                self._build()
            self._launches = launches = Launches(self, self._begin(grads))
            if self._sums is None or is_capturing():
                self.sums, self._sums = self._own(), None
            launches.measure(known=())
            launches.totals(self._cuts)
            launches.slices(measured=True, finished=False)
            launches.run()
        if self._sums is None:
            self._sums = self._views()
        self._unfinished = set(self._cuts)
        for sums in self._sums:
            sums.mu = sums.u2 = None
        for sums, place in self._cut_both:
            sums.rows = place.row_sums
            sums.S.copy_(place.S)
        return self._sums

    def measure_again(self) -> None:
        if "both" not in self._cuts:
            return
        assert self._sums is not None
        with device_of(self.device):
            self._launches.measure(known=(), again=True)
            self._launches.totals(("both",))
            self._launches.run()
        for sums, place in self._cut_both:
            sums.rows = place.rows
            place.S.copy_(sums.S)

    def finish_columns(self, places: Sequence[int]) -> None:
        chosen = [k for k in places if self.work[k].layout.factored]
        assert self._sums is not None
        with device_of(self.device):
            for cut in {self._described[k].launch.cut for k in chosen}:
                self._launches.columns(cut, totals=True, matrix_sums=True)
                self._unfinished.remove(cut)
            self._launches.run()
        for k in chosen:
            sums, layout, place = self._sums[k], self.work[k].layout, self._places[k]
            over = kept(layout, (*layout.rows, *layout.columns))
            sums.columns, sums.weighted = (place.partials[..., which].sum(1).view(over) for which in (0, 1))

    def finish(self) -> None:
        """Equations 3, 7, 9 and 10."""
        assert self._sums is not None
        with device_of(self.device):
            launches = self._launches
            for cut in self._unfinished:
                launches.columns(cut, totals=True)
            launches.slices(measured=False, finished=True)
            launches.run()
            for k, sums in enumerate(self._sums):
                if sums.u2 is not None:
                    first, count = self.plan.records[k, _PLACE["slice"]], self._described[k].form.slices
                    self.found.view(-1, 3)[first : first + count, 0] = sums.u2.view(-1)
                if sums.mu is not None:
                    self._places[k].root_mu.copy_(sums.mu.reshape(-1).sqrt())
                sums.columns = sums.weighted = None
            launches.finish(self.updated, count=False)
            launches.run()

    def apply(self, skipped: Tensor, absent: Container[int] = ()) -> None:
        """Equations 11 to 13, of everything but what is ``absent``."""
        with device_of(self.device):
            self._launches.count(skipped)
            self._launches.apply()
            self._launches.run()
        self._wrote(skipped)

    def release(self) -> None:
        """The tables hold addresses, not tensors."""

    def _wrote(self, skipped: Tensor) -> None:
        if self._recorded:
            written = [tensor for w in self.work for tensor in (w.param, *(w.state[name] for name in w.slots))]
            tensors = [tensor.detach() for tensor in written]
            _captured[skipped] = [*_captured.get(skipped, ()), [*self._kept, *self._recorded, *tensors]]
            self._recorded = []
        written = [p for k, p in enumerate(self._params) if k not in self._absent] if self._absent else self._params
        torch.autograd.graph.increment_version(written)
        if self._before is None:
            self._versions = None
            return
        versions, old = [version + 1 for version in self._before], self._versions
        for k in self._absent:  # its sum is of the x that it was left with
            versions[k] = -1 if old is None else old[k]
        self._versions, self._before = versions, None

    def _known(self, skipped: Tensor) -> frozenset[Launch]:
        """The launches of measure whose Σx² stand in ``squares``: apply left them, and nobody wrote to x since.

        What the version counter does not count (``param.data``, a graph's replay) is seen every ``REMEASURE`` steps,
        and once something was captured nothing is taken as known.
        """
        versions, old = list(map(_version_of, self._params)), self._versions
        self._before = versions
        self._steps += 1
        if old is None or self._steps % REMEASURE == 0 or skipped in _captured or is_capturing():
            return frozenset()
        if versions == old:
            return self._all_known
        changed = {k for k, version in enumerate(versions) if version != old[k]}
        return frozenset(launch for launch in self._all_known if changed.isdisjoint(self.plan.members[launch]))

    def _begin(self, grads: Sequence[Tensor | None]) -> Tensor:
        """Bring the gradients' addresses and the learning rates to the device, where they have changed."""
        count, capturing = len(self.work), is_capturing()
        if (self._of_graph and not capturing) or not all(
            group.settings is said for group, said in zip(self._groups, self._settings, strict=True)
        ):
            self._build()
        addresses, dtypes = addresses_of(grads), dtypes_of(grads, self._dtypes)
        everywhere = np.count_nonzero(addresses) == count
        self._absent = set() if everywhere else set(np.flatnonzero(addresses == 0).tolist())
        lrs = [group.lr for group in self._groups]
        on_device = {k: lr for k, lr in enumerate(lrs) if isinstance(lr, Tensor) and lr.device.type != "cpu"}
        rates = [0.0 if k in on_device else float(lr) for k, lr in enumerate(lrs)]
        told = addresses.tobytes(), rates
        if capturing or told != self.sent or dtypes != self._dtypes:
            values = np.concatenate([addresses, np.array(rates).view(np.int64)])
            # A tensor that was once read in narrow words is from then on: buckets of gradients stay where they are.
            aligned = self._aligned & (addresses % 16 == 0)
            if dtypes != self._dtypes or not np.array_equal(aligned, self._aligned):
                self._dtypes, self._aligned = dtypes, aligned
                self._build()
        varying = self.varying
        if capturing:
            varying = self._capture(values)
        else:
            self._guard()
            if told != self.sent:
                send(varying, pinned(values, self.device))
                self.sent = told
            if self._reserve is None and self.device.type != "cpu":
                self._reserve = torch.empty(len(varying), dtype=torch.int64, pin_memory=True)
        for place, lr in on_device.items():
            send(varying[count + place].view(torch.float64), lr.detach().reshape(()))
        return varying

    def _capture(self, values: NDArray[np.int64]) -> Tensor:
        """A table of the graph's own: eager steps go on with theirs, and no replay reads it.

        Its copy on the host was pinned by an earlier step: pinning inside a capture is an error before PyTorch 2.9.
        """
        source, self._reserve = self._reserve, None
        if source is None:
            source = pinned(values, self.device)
        else:
            source.copy_(torch.from_numpy(values))
        varying = torch.empty(len(values), dtype=torch.int64, device=self.device)
        send(varying, source)
        self._recorded += [source, varying]
        return varying

    def _own(self) -> Tensor:
        """A buffer for the sums over parts that nobody else uses: others step between measure and finish."""
        made = torch.empty(max(self.plan.sums, 1), dtype=torch.float32, device=self.device)
        self._recorded += [made] if is_capturing() else []
        return made

    def _shared(self) -> Tensor:
        """The buffer that every step on this stream fills and empties; by far the largest of all."""
        stream = None if self.device.type == "cpu" else torch.accelerator.current_stream(self.device)
        found = _scratch.get((self.device, stream))
        if found is None or found.buffer.numel() < self.plan.sums:
            found = _scratch[self.device, stream] = Scratch(self._own())
        self._scratch = found
        return found.buffer

    def _guard(self) -> None:
        """Buffers that another stream than the one they were made on uses are not free before it is done with them."""
        if self.device.type == "cpu":
            return
        stream = torch.accelerator.current_stream(self.device)
        if stream in self._streams:
            return
        if self._streams:
            for tensor in self._kept:
                if tensor.device.type != "cpu":
                    tensor.record_stream(stream)
        self._streams.add(stream)

    def _views(self) -> list[Sums]:
        """The buffers as tensors, in the shapes of `Sums`: what is written there is what finish reads.

        Of a part that is cut along both sides S is a copy: the second measurement writes its own.
        """
        views, self._places, self._cut_both = [], {}, []
        for k, (w, tensor) in enumerate(zip(self.work, self._described, strict=True)):
            form, layout = tensor.form, w.layout
            record = dict(zip(FIELDS, self.plan.records[k].tolist(), strict=True))
            slices = self.found.view(-1, 3)[record["slice"] : record["slice"] + form.slices]
            Q = slices[:, 1].view(kept(layout, layout.whole))
            if not form.factored:
                views.append(Sums(None, None, slices[:, 0].view(kept(layout, layout.whole)), Q))
                continue
            matrices, parts, m, tiles = record["matrices"], record["parts"], record["m"], record["tiles"]
            S, W = (
                self.sums.as_strided((matrices, m), (parts * m, 1), record["sums"] + half * matrices * parts * m).view(
                    kept(layout, layout.rows)
                )
                for half in (0, 1)
            )
            rows, row_sums = (
                self.sums[record[name] :][: matrices * record["n"]].view(kept(layout, layout.columns))
                for name in ("finished", "row_totals" if tensor.launch.cut == "both" else "finished")
            )
            partials = self.partials.view(-1, 3)[record["partial"] :][: matrices * tiles].view(-1, tiles, 3)
            self._places[k] = place = Place(rows, row_sums, S, partials, self.roots[record["root_mu"] :][:matrices])
            views.append(Sums(rows, S, W, Q))
            if tensor.launch.cut == "both":
                views[k].S = torch.empty_like(S)
                self._cut_both.append((views[k], place))
        return views


def form_of(w: Work) -> Canonical | None:
    """The kernels' form of a tensor, or ``None`` where only ``eager.py`` can update it."""
    beside = [w.state[name] for name in ("momentum", "residual") if name in w.slots]
    dense = all(tensor.is_contiguous() for tensor in (w.param, *beside))
    if not dense or w.param.dtype == torch.float64:
        return None
    form = canonical(w.layout)
    if form is None or not isinstance(w.layout, Part):
        return form
    draws = w.settings.stochastic_rounding or any(tensor.dtype == torch.int8 for tensor in beside)
    if not w.layout.size or (draws and not _numbered(_in_memory(w.layout, form))):
        return None
    if not form.transposed or w.layout.cut == "nothing":
        return form
    # A part's rows are whole and its columns may not be: they are finished first, wherever they stand.
    return form._replace(columns_first=True) if w.layout.cut == "rows" and form.inner == 1 else None


def _in_kernel(form: Canonical) -> Canonical:
    """The form with the rows that measure finishes as its rows."""
    return form._replace(rows=form.columns, columns=form.rows, transposed=False) if form.columns_first else form


def launch_of(w: Work, form: Canonical, grad: torch.dtype, aligned: bool, at_once: bool) -> Launch:
    """Which launch a tensor belongs to; ``at_once``: all verbs may be one."""
    settings, hp = w.settings, w.settings.hyperparameters
    momentum = w.state["momentum"] if hp.momentum is not None else None
    tensors = [w.param, *(w.state[name] for name in w.slots if name != "step")]
    aligned = aligned and all(tensor.data_ptr() % 16 == 0 for tensor in tensors)
    int8 = momentum is not None and momentum.dtype == torch.int8
    cut = w.layout.cut if isinstance(w.layout, Part) else None
    if cut is not None and (not form.factored or cut not in ("stack", "both")):
        cut = "rows"
    kernels = _in_kernel(form)
    on_chip = triton_table.on_chip(form) if at_once and cut is None and not int8 else None
    tile = triton_table.tile_of(kernels, whole_rows=cut != "both", transposed=form.columns_first)
    return Launch(
        tile=on_chip or (tile if form.factored else None),
        param=_NAMES[w.param.dtype],
        grad=_NAMES[grad],
        momentum="" if momentum is None else _NAMES[momentum.dtype],
        scale=hp.scale_parameter,
        stochastic=settings.stochastic_rounding and w.param.dtype in (torch.bfloat16, torch.float16),
        compensated=w.compensated,
        huge=(form.size if cut is None else w.layout.slice_size * form.slices) > 1 << 31,
        aligned=aligned and form.columns % 16 == 0 and (not form.columns_first or form.rows % 16 == 0),
        flat=not form.factored or (int8 and form.columns % BLOCK != 0),
        sliced=form.slices > 1,
        cut=cut,
        transposed=form.columns_first,
        on_chip=on_chip is not None,
    )


@cache
def _kernels() -> Any:
    """Imported with the first step: Triton is no part of importing this package."""
    from adafactor.engine.torch import triton_kernels

    return triton_kernels


class Launches:
    """The launches of one step; `triton_kernels.py` says what each does. They wait in ``queue`` for ``run``."""

    def __init__(self, tables: Triton, varying: Tensor) -> None:
        self._t, self._varying, self._k = tables, varying, _kernels()
        self.queue: list[Callable[[], object]] = []
        self._lanes, self._shared = _lanes(tables.device), _shared(tables.device)
        # Fused multiply-add is said aloud: a release of Triton that changes its default must not change the bits.
        self._common = {"enable_fp_fusion": True}
        self._capped = {"maxnreg": triton_table.REGISTERS} if self._lanes == 32 and torch.version.hip is None else {}

    def _warps(self, warps: int) -> dict[str, Any]:
        return {"num_warps": max(1, warps * 32 // self._lanes), **self._common}

    def _launch(self, kernel: Any, programs: int) -> Callable[..., None]:
        return lambda *args, **constants: self.queue.append(partial(kernel[(programs,)], *args, **constants))

    def run(self) -> None:
        for launch in self.queue:
            launch()
        self.queue.clear()

    def measure(self, known: Container[Launch], again: bool = False) -> None:
        """``known``: of which launches Σx² needs no reading. ``again``: only what lacked its row sums."""
        t, k, varying, count = self._t, self._k, self._varying, len(self._t.work)
        if not again:
            rates = varying[count:].view(torch.float64)
            self._launch(k.begin, -(-count // 128))(
                t.records, t.numbers, rates, t.scalars, count, BLOCK=128, **self._warps(4)
            )  # fmt: skip
        for launch, blocks in t.measured.items():
            tile, scale, apart = launch.tile, launch.scale and launch not in known, launch.cut == "both"
            if again and not apart:
                continue
            if tile is None:
                self._launch(k.measure_flat, len(blocks))(
                    t.records, t.numbers, varying, t.scalars, blocks, t.partials, t.squares,
                    BLOCK=triton_table.FLAT_TILE, PARAM=k.dtype(launch.param), GRAD=k.dtype(launch.grad), SCALE=scale,
                    ALIGNED=launch.aligned, **self._warps(4),
                )  # fmt: skip
                continue
            if tile.wide and not again:
                self._measure(launch, k.TO_COME, scale and apart)
                self._launch(k.row_sums, len(blocks))(
                    t.records, varying, blocks, t.sums, NP=min(tile.NP, 32), C=32, **self._warps(4)
                )  # fmt: skip
            if again or not apart:
                self._measure(launch, k.GIVEN if tile.wide else k.IN_TILE, scale and not again)

    def _measure(self, launch: Launch, rows: Any, scale: bool) -> None:
        t, k, tile, blocks = self._t, self._k, launch.tile, self._t.measured[launch]
        assert tile is not None
        self._launch(k.measure, len(blocks))(
            t.records, t.numbers, self._varying, t.scalars, blocks, t.sums, t.squares,
            K=tile.K, NP=tile.NP, M=tile.M, PARAM=k.dtype(launch.param), GRAD=k.dtype(launch.grad),
            SCALE=scale, ROWS=rows.value, TRANSPOSED=launch.transposed, ALIGNED=launch.aligned,
            STAGES=tile.stages(self._shared, _SIZES[launch.grad], _SIZES[launch.param] * scale),
            **self._warps(tile.warps), **(self._capped if tile.M >= 16 else {}),
        )  # fmt: skip

    def on_chip(self, known: Container[Launch], skipped: Tensor) -> None:
        t, k = self._t, self._k
        for launch, blocks in t.held.items():
            tile = launch.tile
            assert tile is not None
            self._launch(k.on_chip, len(blocks))(
                t.records, t.numbers, self._varying, t.scalars, blocks, t.squares, skipped,
                NP=tile.NP, M=tile.M, FACTORED=not launch.flat, PARAM=k.dtype(launch.param), GRAD=k.dtype(launch.grad),
                MOMENTUM=k.dtype(launch.momentum) if launch.momentum else None, STOCHASTIC=launch.stochastic,
                COMPENSATED=launch.compensated, SCALE=launch.scale and launch not in known, ALIGNED=launch.aligned,
                **self._warps(tile.warps), **self._capped,
            )  # fmt: skip

    def totals(self, cuts: Container[Cut | None]) -> None:
        t = self._t
        for (K, P, C, cut), blocks in t.columns.items():
            if cut in cuts:
                self._launch(self._k.totals, len(blocks))(
                    t.records, self._varying, blocks, t.sums, K=K, P=P, C=C, **self._warps(4)
                )  # fmt: skip

    def columns(self, cut: Cut | None, totals: bool, matrix_sums: bool = False) -> None:
        t = self._t
        for (K, P, C, which), blocks in t.columns.items():
            if which == cut:
                self._launch(self._k.columns, len(blocks))(
                    t.records, t.numbers, self._varying, t.scalars, blocks, t.sums, t.partials, t.roots,
                    K=K, P=P, C=C, TOTALS=totals, MATRIX_SUMS=matrix_sums, **self._warps(4),
                )  # fmt: skip

    def slices(self, measured: bool, finished: bool) -> None:
        t = self._t
        self._launch(self._k.slices, len(t.slices))(
            t.records, self._varying, t.slices, t.partials, t.squares, t.roots, t.found,
            MEASURED=measured, FINISHED=finished, KB=16, TB=64, BLOCK=1024, **self._warps(4),
        )  # fmt: skip

    def finish(self, skipped: Tensor, count: bool) -> None:
        t = self._t
        self._launch(self._k.finish, len(t.work))(
            t.records, t.numbers, self._varying, t.scalars, t.found, t.moves, t.updated, skipped,
            BLOCK=128, COUNT=count, **self._warps(4),
        )  # fmt: skip

    def count(self, skipped: Tensor) -> None:
        t = self._t
        self._launch(self._k.count, len(t.work))(t.records, self._varying, t.updated, skipped, **self._warps(1))

    def apply(self) -> None:
        t, k = self._t, self._k
        tensors = (t.records, t.numbers, self._varying, t.scalars)
        buffers = (t.sums, t.roots, t.moves, t.updated, t.squares)
        for launch, blocks in t.applied.items():
            constants = {
                "PARAM": k.dtype(launch.param),
                "GRAD": k.dtype(launch.grad),
                "MOMENTUM": k.dtype(launch.momentum) if launch.momentum else None,
                "STOCHASTIC": launch.stochastic,
                "COMPENSATED": launch.compensated,
                "HUGE": launch.huge,
                "PART": launch.part,
                **({} if launch.flat else {"TRANSPOSED": launch.transposed}),
                "SQUARES": launch.keeps_squares,
                "ALIGNED": launch.aligned,
            }
            coded = launch.momentum == "int8"
            if launch.flat:
                factored, size = launch.tile is not None, triton_table.FLAT_TILE
                self._launch(k.apply_flat, len(blocks))(
                    *tensors, blocks, *buffers, BLOCK=size, FACTORED=factored, SLICED=launch.sliced, **constants,
                    **self._warps(8 if coded else 4),
                )  # fmt: skip
                continue
            assert launch.tile is not None
            tile = launch.tile
            stored = (launch.param, launch.grad, launch.momentum, "bfloat16" if launch.compensated else "")
            stages = tile.stages(self._shared, *(_SIZES[name] for name in stored if name))
            self._launch(k.apply, len(blocks))(
                *tensors, blocks, *buffers, K=tile.K, NP=tile.NP, M=tile.M, STAGES=stages, **constants,
                **self._warps(tile.warps), **(self._capped if tile.M >= 16 else {}),
            )  # fmt: skip
