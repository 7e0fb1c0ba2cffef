"""The Triton kernels under the PyTorch front end: a list of work becomes tables on the device and a few launches.

A step costs the host the addresses of the gradients, one copy to the device where these or a learning rate have
changed, and about ten launches whatever the number of tensors. Nothing waits for the device, and all of it can be
captured in a CUDA graph. What has no form that the kernels know, and float64, goes to ``eager.py``, tensor by tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from operator import attrgetter, is_
from typing import Any, NamedTuple, cast
from weakref import WeakValueDictionary

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from adafactor.core.factoring import Cut, Part
from adafactor.engine.torch import accelerator, triton_table
from adafactor.engine.torch.blocks import kept
from adafactor.engine.torch.cpu import _globalise, dtypes_of
from adafactor.engine.torch.memory import addresses_of
from adafactor.engine.torch.triton_forms import form_of, in_kernel, launch_of
from adafactor.engine.torch.triton_launches import Launches
from adafactor.engine.torch.triton_table import FIELDS, FLAGS, NUMBERS, Launch, Tables
from adafactor.engine.torch.work import Sums, Work

_PLACE = {name: place for place, name in enumerate(FIELDS)}
_dtype_of, _version_of = attrgetter("dtype"), attrgetter("_version")

# Every so many steps Σx² (eq. 6) is taken from the parameters again, whatever their version counters say.
REMEASURE = 64


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
        self._of_graph = (
            accelerator.is_capturing()
        )  # its uploads wait for a replay: no eager step may read these tables
        forms = [form_of(w) for w in work]
        self._described = [
            triton_table.Tensor(in_kernel(form), launch_of(w, form, dtype, aligned, self._at_once))
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
            source = accelerator.pinned(array, device)
            target = buffer(array.size, source.dtype)[: array.size].view(source.shape)
            accelerator.send(target, source)
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
        with accelerator.device_of(self.device):
            varying = self._begin(grads)
            sums = self._own() if accelerator.is_capturing() else self._shared()
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
        with accelerator.device_of(self.device):
            if self._at_once:
                self._at_once = False
                self._build()
            self._launches = launches = Launches(self, self._begin(grads))
            if self._sums is None or accelerator.is_capturing():
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
        with accelerator.device_of(self.device):
            self._launches.measure(known=(), again=True)
            self._launches.totals(("both",))
            self._launches.run()
        for sums, place in self._cut_both:
            sums.rows = place.rows
            place.S.copy_(sums.S)

    def finish_columns(self, places: Sequence[int]) -> None:
        chosen = [k for k in places if self.work[k].layout.factored]
        assert self._sums is not None
        with accelerator.device_of(self.device):
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
        with accelerator.device_of(self.device):
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
        with accelerator.device_of(self.device):
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
        if old is None or self._steps % REMEASURE == 0 or skipped in _captured or accelerator.is_capturing():
            return frozenset()
        if versions == old:
            return self._all_known
        changed = {k for k, version in enumerate(versions) if version != old[k]}
        return frozenset(launch for launch in self._all_known if changed.isdisjoint(self.plan.members[launch]))

    def _begin(self, grads: Sequence[Tensor | None]) -> Tensor:
        """Bring the gradients' addresses and the learning rates to the device, where they have changed."""
        count, capturing = len(self.work), accelerator.is_capturing()
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
                accelerator.send(varying, accelerator.pinned(values, self.device))
                self.sent = told
            if self._reserve is None and self.device.type != "cpu":
                self._reserve = torch.empty(len(varying), dtype=torch.int64, pin_memory=True)
        for place, lr in on_device.items():
            accelerator.send(varying[count + place].view(torch.float64), lr.detach().reshape(()))
        return varying

    def _capture(self, values: NDArray[np.int64]) -> Tensor:
        """A table of the graph's own: eager steps go on with theirs, and no replay reads it.

        Its copy on the host was pinned by an earlier step: pinning inside a capture is an error before PyTorch 2.9.
        """
        source, self._reserve = self._reserve, None
        if source is None:
            source = accelerator.pinned(values, self.device)
        else:
            source.copy_(torch.from_numpy(values))
        varying = torch.empty(len(values), dtype=torch.int64, device=self.device)
        accelerator.send(varying, source)
        self._recorded += [source, varying]
        return varying

    def _own(self) -> Tensor:
        """A buffer for the sums over parts that nobody else uses: others step between measure and finish."""
        made = torch.empty(max(self.plan.sums, 1), dtype=torch.float32, device=self.device)
        self._recorded += [made] if accelerator.is_capturing() else []
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
