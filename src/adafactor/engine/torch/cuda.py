"""The Triton kernels under the PyTorch front end: a list of work becomes tables on the device and a few launches.

A step costs the host the addresses of the gradients, one copy to the device where these or a learning rate have
changed, and about ten launches whatever the number of tensors. Nothing waits for the device, and all of it can be
captured in a CUDA graph. What has no form that the kernels know, and float64, goes to ``eager.py``, tensor by tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Mapping, Sequence, Set
from operator import attrgetter, is_
from typing import Any
from weakref import WeakValueDictionary

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from adafactor.core.factoring import Cut
from adafactor.engine.torch import accelerator
from adafactor.engine.torch.blocks import kept
from adafactor.engine.torch.cpu import dtypes_of
from adafactor.engine.torch.memory import addresses_of
from adafactor.engine.torch.triton.launches import Launches
from adafactor.engine.torch.triton.table import Launch
from adafactor.engine.torch.triton.uploads import Buffered, Uploaded, views
from adafactor.engine.torch.work import Sums, Work

_version_of = attrgetter("_version")

# Every so many steps Σx² (eq. 6) is taken from the parameters again, whatever their version counters say.
REMEASURE = 64


# What captured steps read, by the optimizer's counter of skipped tensors, which they write: neither a change of groups
# or of the state nor other lists of gradients may free it. What a capture itself allocates belongs to its graph.
_captured: Any = WeakIdKeyDictionary()


# By device and stream the buffer for the sums over parts, which lives as long as a list that has used it.
_scratch: WeakValueDictionary[tuple[torch.device, object], Tensor] = WeakValueDictionary()


class Known:
    """The launches of measure whose Σx² (eq. 6) stand in ``squares``: apply left them, and nobody wrote to x since.

    Versions of views of one tensor, which count for each other, are taken as lower than they are: their x is read at
    every step.
    """

    def __init__(self, work: Sequence[Work], members: Mapping[Launch, Sequence[int]]) -> None:
        self._params, self._members = [w.param for w in work], members
        self._all = frozenset(launch for launch in members if launch.keeps_squares)
        self._left: list[int] | None = None  # versions of the parameters when apply left their sums
        self._now: list[int] | None = None  # what they are in a step
        self._steps = 0

    def launches(self, doubted: bool) -> frozenset[Launch]:
        """As of the step that begins. What no version counter counts is seen every ``REMEASURE`` steps."""
        now, left = list(map(_version_of, self._params)), self._left
        self._now = now
        self._steps += 1
        if left is None or doubted or self._steps % REMEASURE == 0:
            return frozenset()
        if now == left:
            return self._all
        changed = {k for k, version in enumerate(now) if version != left[k]}
        return frozenset(launch for launch in self._all if changed.isdisjoint(self._members[launch]))

    def wrote(self, absent: Set[int]) -> None:
        """Tell autograd what was written, all but the ``absent``; their sums are of the x that they were left with."""
        written = [p for k, p in enumerate(self._params) if k not in absent] if absent else self._params
        torch.autograd.graph.increment_version(written)
        versions = None if self._now is None else [version + 1 for version in self._now]
        if versions is not None:
            for k in absent:
                versions[k] = -1 if self._left is None else self._left[k]
        self._left, self._now = versions, None


class Triton:
    """A list of work whose every tensor has a `form_of`. See `work.Backend`.

    Attributes:
        tables: on the device, made anew where gradients or groups no longer fit them.
    """

    def __init__(self, work: Sequence[Work]) -> None:
        self.work = work
        self.device = work[0].param.device
        self._aligned = np.ones(len(work), bool)
        self._dtypes: list[Any] = [w.param.dtype for w in work]
        self._absent: set[int] = set()
        self._buffered: dict[int, Buffered] = {}
        self._unfinished: set[Cut | None] = set()
        self._reserve: Tensor | None = None
        self._at_once = True  # the verbs are not called one by one
        self._recorded: list[Tensor] = []  # what a capture in progress has made
        self.sums = torch.empty(0, device=self.device)
        self._build()

    def counts(self) -> bool:
        return True

    def _build(self) -> None:
        self.tables = Uploaded(self.work, self._dtypes, self._aligned, self._at_once)
        self._known = Known(self.work, self.tables.plan.members)
        self._sent: tuple[bytes, list[float]] | None = None  # what `Uploaded.varying` holds
        self._told: tuple[object, ...] = ()  # to the launches of the last step
        self._sums: list[Sums] | None = None
        self._streams: set[object] = set()  # that have used the tables, first the one they were made on

    def step(self, grads: Sequence[Tensor | None], skipped: Tensor) -> None:
        """One update of everything. Launches only; what they find decides on the device."""
        with accelerator.device_of(self.device):
            varying = self._begin(grads)
            sums = self._own() if accelerator.is_capturing() else self._shared()
            # Replays write without counting: once something was captured nothing is taken as known.
            known = self._known.launches(doubted=skipped in _captured or accelerator.is_capturing())
            told = varying, sums, skipped, known
            if len(told) != len(self._told) or not all(map(is_, told, self._told)):
                self.sums = sums
                self._step, self._told = self._launches_of_step(varying, skipped, known), told
            for launch in self._step:
                launch()
        self._wrote(skipped)

    def _launches_of_step(
        self, varying: Tensor, skipped: Tensor, known: Container[Launch]
    ) -> list[Callable[[], object]]:
        launches = Launches(self.tables, varying, self.sums)
        launches.measure(known)
        launches.on_chip(known, skipped)
        launches.columns(self.tables.cuts)
        if len(self.tables.plan.slices):
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
            self._varying = varying = self._begin(grads)
            if self._sums is None or accelerator.is_capturing():
                self.sums, self._sums = self._own(), None
            self._launches = launches = Launches(self.tables, varying, self.sums)
            launches.measure(known=())
            launches.columns(self.tables.cuts, finish=False)
            launches.slices(measured=True, finished=False)
            launches.run()
        if self._sums is None:
            self._sums, self._buffered = views(self.tables, self.sums, self.work)
        self._unfinished = set(self.tables.cuts)
        for sums in self._sums:
            sums.mu = sums.u2 = sums.nonfinite = None
        for sums, its in self._cut_both():
            sums.rows = its.row_sums
            assert sums.S is not None
            sums.S.copy_(its.S)
        return self._sums

    def _cut_both(self) -> Iterator[tuple[Sums, Buffered]]:
        """The parts that are measured twice."""
        assert self._sums is not None
        return ((self._sums[k], its) for k, its in self._buffered.items() if self.work[k].layout.cut == "both")

    def measure_again(self) -> None:
        if "both" not in self.tables.cuts:
            return
        with accelerator.device_of(self.device):
            self._launches.measure(known=(), again=True)
            self._launches.columns(("both",), finish=False)
            self._launches.run()
        for sums, its in self._cut_both():
            sums.rows = its.rows
            assert sums.S is not None
            its.S.copy_(sums.S)

    def finish_columns(self, places: Sequence[int]) -> None:
        chosen = [k for k in places if self.work[k].layout.factored]
        assert self._sums is not None
        with accelerator.device_of(self.device):
            cuts = {self.tables.described[k].launch.cut for k in chosen}
            self._launches.columns(cuts, add=False, matrix_sums=True)
            self._unfinished -= cuts
            self._launches.run()
        for k in chosen:
            sums, layout, partials = self._sums[k], self.work[k].layout, self._buffered[k].partials
            over = kept(layout, (*layout.rows, *layout.columns))
            sums.columns, sums.weighted = (partials[..., which].sum(1).view(over) for which in (0, 1))

    def finish(self) -> None:
        """Equations 3, 7, 9 and 10."""
        assert self._sums is not None
        with accelerator.device_of(self.device):
            launches = self._launches
            launches.columns(self._unfinished, add=False)
            launches.slices(measured=False, finished=True)
            launches.run()
            for k, sums in enumerate(self._sums):
                if sums.u2 is not None:
                    self.tables.of_slices(k)[:, 0] = sums.u2.view(-1)
                if sums.mu is not None:
                    self._buffered[k].root_mu.copy_(sums.mu.reshape(-1).sqrt())
                sums.columns = sums.weighted = None
            launches.finish(self.tables.updated, count=False)
            launches.run()

    def apply(self, skipped: Tensor, absent: Container[int] = ()) -> None:
        """Equations 11 to 13, of everything but what is ``absent``."""
        self._absent |= {k for k in range(len(self.work)) if k in absent}
        with accelerator.device_of(self.device):
            for k in self._absent:  # as of one without a gradient
                self._varying[k].zero_()
                self._sent = None
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
            _captured[skipped] = [*_captured.get(skipped, ()), [*self.tables.tensors, *self._recorded, *tensors]]
            self._recorded = []
        self._known.wrote(self._absent)

    def _begin(self, grads: Sequence[Tensor | None]) -> Tensor:
        """Bring the gradients' addresses and the learning rates to the device, where they have changed."""
        count, capturing = len(self.work), accelerator.is_capturing()
        if not self.tables.serve(capturing):
            self._build()
        addresses, dtypes = addresses_of(grads), dtypes_of(grads, self._dtypes)
        everywhere = np.count_nonzero(addresses) == count
        self._absent = set() if everywhere else set(np.flatnonzero(addresses == 0).tolist())
        lrs = [group.lr for group in self.tables.groups]
        on_device = {k: lr for k, lr in enumerate(lrs) if isinstance(lr, Tensor) and lr.device.type != "cpu"}
        rates = [0.0 if k in on_device else float(lr) for k, lr in enumerate(lrs)]
        told = addresses.tobytes(), rates
        if capturing or told != self._sent or dtypes != self._dtypes:
            values = np.concatenate([addresses, np.array(rates).view(np.int64)])
            # A tensor that was once read in narrow words is from then on: buckets of gradients stay where they are.
            aligned = self._aligned & (addresses % 16 == 0)
            if dtypes != self._dtypes or not np.array_equal(aligned, self._aligned):
                self._dtypes, self._aligned = dtypes, aligned
                self._build()
        varying = self.tables.varying
        if capturing:
            varying = self._capture(values)
        else:
            self._guard()
            if told != self._sent:
                accelerator.send(varying, accelerator.pinned(values, self.device))
                self._sent = told
            if self._reserve is None and self.device.type != "cpu":
                self._reserve = torch.empty(len(varying), dtype=torch.int64, pin_memory=True)
        for k, lr in on_device.items():
            accelerator.send(varying[count + k].view(torch.float64), lr.detach().reshape(()))
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
        made = torch.empty(max(self.tables.plan.sizes["sums"], 1), dtype=torch.float32, device=self.device)
        self._recorded += [made] if accelerator.is_capturing() else []
        return made

    def _shared(self) -> Tensor:
        """The buffer that every step on this stream fills and empties; by far the largest of all."""
        stream = None if self.device.type == "cpu" else torch.accelerator.current_stream(self.device)
        self._scratch = _scratch.get((self.device, stream))
        if self._scratch is None or self._scratch.numel() < self.tables.plan.sizes["sums"]:
            self._scratch = _scratch[self.device, stream] = self._own()
        return self._scratch

    def _guard(self) -> None:
        """Buffers that another stream than the one they were made on uses are not free before it is done with them."""
        if self.device.type == "cpu":
            return
        stream = torch.accelerator.current_stream(self.device)
        if stream in self._streams:
            return
        if self._streams:
            for tensor in (*self.tables.tensors, self.sums):
                if tensor.device.type != "cpu":
                    tensor.record_stream(stream)
        self._streams.add(stream)
