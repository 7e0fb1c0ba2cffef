"""The Triton kernels under the PyTorch front end: a list of work becomes tables on the device and a few launches.

The tables are kept for as long as the same parameters come in the same order. A step then costs the host the
addresses of the gradients, one copy to the device where these or a learning rate have changed, and about ten
launches whatever the number of tensors. Nothing waits for the device, and all of it can be captured in a CUDA graph.
What has no form that the kernels know, and float64, goes to ``eager.py``, tensor by tensor.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from adafactor.core.canonical import Canonical, canonical
from adafactor.core.factoring import Part
from adafactor.engine.torch import eager, triton_table
from adafactor.engine.torch.int8 import BLOCK
from adafactor.engine.torch.triton_table import FIELDS, FLAGS, NUMBERS, Launch, Tables
from adafactor.engine.torch.work import Work

_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16", torch.float64: "float64"}
_NAMES[torch.int8] = "int8"
_SIZES = {name: dtype.itemsize for dtype, name in _NAMES.items()}
_PLACE = {name: place for place, name in enumerate(FIELDS)}


@cache
def why_not(device: torch.device) -> str | None:
    """One sentence that says why Triton kernels cannot run on a device, or ``None`` where they can."""
    if device.type != "cuda":
        return f"The Triton kernels are for cuda tensors, not for {device.type} tensors."
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed; the CUDA builds of PyTorch bring it along, or pip install triton."
    if not torch.cuda.is_available():
        return "This build of PyTorch has no CUDA." if torch.version.cuda is None else "There is no CUDA device."
    if torch.version.hip is None and torch.cuda.get_device_capability(device) < (7, 0):
        return f"Triton needs compute capability 7.0 or later, and {torch.cuda.get_device_name(device)} has less."
    return None


class Step:
    """The kernel ``step(work, skipped)`` for CUDA tensors, with the tables of the last ``lists`` lists or fewer."""

    def __init__(self, lists: int = 8) -> None:
        self._lists = lists
        self._tables: dict[tuple[object, ...], Prepared] = {}

    def __call__(self, work: Sequence[Work], skipped: Tensor) -> None:
        """One update of every parameter in ``work``, all on one device, in place; see ``work.py``."""
        if not all(w.grad.is_contiguous() for w in work):
            eager.step([w for w in work if not w.grad.is_contiguous()], skipped)
            work = [w for w in work if w.grad.is_contiguous()]
        if not work:
            return
        key = _key(work)
        prepared = self._tables.get(key)
        if prepared is None:
            if len(self._tables) >= self._lists:  # a model whose list changes every step must not fill the memory
                self._tables.clear()
            prepared = self._tables[key] = Prepared(work)
        if prepared.other:
            eager.step([work[k] for k in prepared.other], skipped)
        if prepared.chosen:
            with device_of(skipped.device):
                prepared.step([work[k] for k in prepared.chosen], skipped)


def _key(work: Sequence[Work]) -> tuple[object, ...]:
    """All that the tables depend on: every address but the gradients', of which only the alignment matters."""
    states = [w.state for w in work]
    key: list[object] = [all(w.grad.data_ptr() % 16 == 0 for w in work)]
    key += [w.param.data_ptr() for w in work]
    for name in ("step", "row", "column", "second_moment", "momentum", "momentum_scale", "residual"):
        key += [state[name].data_ptr() if name in state else 0 for state in states]
    key += [0 if w.report is None else w.report.data_ptr() for w in work]
    for w in work:
        key += [w.tensor, w.param.dtype, w.grad.dtype, id(w.layout), id(w.settings), w.param.is_contiguous()]
    return tuple(key)


def device_of(device: torch.device) -> AbstractContextManager[object]:
    """Triton launches on the current device."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


class Prepared:
    """The tables of a list of work, on its device, and the buffers between the kernels. It keeps no tensor alive.

    Attributes:
        chosen: places in the list of what the tables hold, in their order; ``other``: of what they cannot hold.
        uploads: whatever a captured copy to the device reads again at every replay.
    """

    def __init__(self, work: Sequence[Work]) -> None:
        forms = [form_of(w) for w in work]
        self.chosen = [k for k, form in enumerate(forms) if form is not None]
        self.other = [k for k, form in enumerate(forms) if form is None]
        self.uploads: list[Tensor] = []
        self._kept = [(w.settings, w.layout) for w in work]  # so that no others get their ids
        if self.chosen:
            self._build([work[k] for k in self.chosen], [form for form in forms if form is not None])

    def _build(self, work: list[Work], forms: list[Canonical]) -> None:
        device = work[0].param.device
        aligned = all(w.grad.data_ptr() % 16 == 0 for w in work)
        described = [
            triton_table.Tensor(form, launch_of(w, form, aligned), w.param.element_size())
            for w, form in zip(work, forms, strict=True)
        ]
        plan = triton_table.tables(described)
        places: dict[int, int] = {}  # of a group's learning rate
        self._groups = [places.setdefault(id(w.settings), len(places)) for w in work]
        numbers = self._fill(plan, work, forms)
        self.plan = plan
        self.records, self.numbers = self._upload(plan.records, device), self._upload(numbers, device)
        self.slices = self._upload(plan.slices, device)
        self.measured = {launch: self._upload(blocks, device) for launch, blocks in plan.measure.items()}
        self.applied = {launch: self._upload(blocks, device) for launch, blocks in plan.apply.items()}
        self.columns = {key: self._upload(blocks, device) for key, blocks in plan.columns.items()}

        def buffer(size: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.empty(max(size, 1), dtype=dtype, device=device)

        count = len(work)
        self.scalars, self.updated = buffer(4 * count), buffer(count, torch.int64)
        self.sums, self.partials, self.squares = buffer(plan.sums), buffer(3 * plan.partials), buffer(plan.squares)
        self.roots, self.found = buffer(plan.roots), buffer(3 * len(plan.slices))
        self.moves = buffer(2 * len(plan.slices))
        self.varying = buffer(count + len(places), torch.int64)  # addresses of gradients, then learning rates
        self.sent: NDArray[np.int64] | None = None  # what it holds

    def _fill(self, plan: Tables, work: list[Work], forms: list[Canonical]) -> NDArray[np.float64]:
        """Complete the records with addresses and what the user has said; returns the numbers."""
        numbers = np.zeros((len(work), len(NUMBERS)))
        for k, (w, form) in enumerate(zip(work, forms, strict=True)):
            state, settings = w.state, w.settings
            hp, record = settings.hyperparameters, plan.records[k]
            first, second = form.slots
            said: dict[str, int] = {
                "param": w.param.data_ptr(),
                "first": state[first].data_ptr(),
                "second": state[second].data_ptr() if second else 0,
                "momentum": state["momentum"].data_ptr() if hp.momentum is not None else 0,
                "scales": state["momentum_scale"].data_ptr() if "momentum_scale" in w.slots else 0,
                "residual": state["residual"].data_ptr() if w.compensated else 0,
                "report": 0 if w.report is None else w.report.data_ptr(),
                "step": state["step"].data_ptr(),
                "lr": self._groups[k],
                "seed": settings.seed - (1 << 64 if settings.seed >> 63 else 0),
                "identity": w.tensor,
            }
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

    def _upload(self, array: NDArray[Any], device: torch.device) -> Tensor:
        """A copy on the device, without waiting for it. A captured copy reads its source at every replay."""
        source = torch.from_numpy(array)
        if device.type != "cuda":
            return source.clone()
        source = source.pin_memory()
        if is_capturing():
            self.uploads.append(source)
        return source.to(device, non_blocking=True)

    def step(self, work: Sequence[Work], skipped: Tensor) -> None:
        """One update of the chosen. Launches only; what they find decides on the device."""
        launch_all(self, self._send(work), skipped)
        torch.autograd.graph.increment_version([w.param for w in work])

    def _send(self, work: Sequence[Work]) -> Tensor:
        """Bring the gradients' addresses and the learning rates to the device, where they have changed."""
        count = len(work)
        lrs = {group: w.lr for group, w in zip(self._groups, work, strict=True)}
        values = np.zeros(count + len(lrs), np.int64)
        values[:count] = [w.grad.data_ptr() for w in work]
        numbers = values[count:].view(np.float64)
        on_device = {}
        for group, lr in lrs.items():
            if isinstance(lr, Tensor) and lr.device.type != "cpu":
                on_device[group] = lr
            else:
                numbers[group] = float(lr)
        varying = self.varying
        if self.sent is None or not np.array_equal(values, self.sent):
            fresh = self._upload(values, varying.device)
            if is_capturing():  # the graph fills a table of its own; eager steps keep theirs
                varying = fresh
                self.uploads.append(fresh)
            else:
                varying.copy_(fresh)
                self.sent = values
        for group, lr in on_device.items():
            varying[count + group].view(torch.float64).copy_(lr.detach().reshape(()))
        return varying


def is_capturing() -> bool:
    """Whether the current stream is being captured in a CUDA graph."""
    if not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return False
    return torch.cuda.is_current_stream_capturing()


def form_of(w: Work) -> Canonical | None:
    """The kernels' form of a tensor, or ``None`` where only ``eager.py`` can update it."""
    beside = [w.state[name] for name in ("momentum", "residual") if name in w.slots]
    dense = all(tensor.is_contiguous() for tensor in (w.param, *beside))
    if not dense or w.param.dtype == torch.float64 or isinstance(w.layout, Part):
        return None
    return canonical(w.layout)


def launch_of(w: Work, form: Canonical, aligned: bool) -> Launch:
    """Which launch a tensor belongs to."""
    settings, hp = w.settings, w.settings.hyperparameters
    momentum = w.state["momentum"] if hp.momentum is not None else None
    tensors = [w.param, *(w.state[name] for name in w.slots if name != "step")]
    aligned = aligned and all(tensor.data_ptr() % 16 == 0 for tensor in tensors)
    int8 = momentum is not None and momentum.dtype == torch.int8
    return Launch(
        tile=triton_table.tile_of(form) if form.factored else None,
        param=_NAMES[w.param.dtype],
        grad=_NAMES[w.grad.dtype],
        momentum="" if momentum is None else _NAMES[momentum.dtype],
        scale=hp.scale_parameter,
        stochastic=settings.stochastic_rounding and w.param.dtype in (torch.bfloat16, torch.float16),
        compensated=w.compensated,
        huge=form.size > 1 << 32,
        aligned=aligned and form.columns % 16 == 0,
        flat=not form.factored or (int8 and form.columns % BLOCK != 0),
        sliced=form.slices > 1,
    )


@cache
def _kernels() -> Any:
    """Imported with the first step: Triton is no part of importing this package."""
    from adafactor.engine.torch import triton_kernels

    return triton_kernels


def launch_all(p: Prepared, varying: Tensor, skipped: Tensor) -> None:
    """The launches of one step, in order; `triton_kernels.py` says what each does."""
    kernels = _kernels()
    count = len(p.chosen)
    rates = varying[count:].view(torch.float64)
    kernels.begin[(-(-count // 128),)](p.records, p.numbers, rates, p.scalars, count, BLOCK=128)
    for launch, blocks in p.measured.items():
        tile, grid = launch.tile, (len(blocks),)
        param, grad = kernels.dtype(launch.param), kernels.dtype(launch.grad)
        if tile is None:
            kernels.measure_flat[grid](
                p.records, p.numbers, varying, p.scalars, blocks, p.partials, p.squares,
                BLOCK=triton_table.FLAT_TILE, PARAM=param, GRAD=grad, SCALE=launch.scale, ALIGNED=launch.aligned,
            )  # fmt: skip
            continue
        if tile.wide:
            kernels.row_parts[grid](
                p.records, varying, blocks, p.sums, NP=tile.NP, M=tile.M, GRAD=grad,
                ALIGNED=launch.aligned, STAGES=tile.stages(_SIZES[launch.grad]), num_warps=tile.warps,
            )  # fmt: skip
        kernels.measure[grid](
            p.records, p.numbers, varying, p.scalars, blocks, p.sums, p.squares,
            K=tile.K, NP=tile.NP, M=tile.M, PARAM=param, GRAD=grad,
            SCALE=launch.scale, WIDE=tile.wide, ALIGNED=launch.aligned,
            STAGES=tile.stages(_SIZES[launch.grad], _SIZES[launch.param] * launch.scale), num_warps=tile.warps,
        )  # fmt: skip
    for (K, P, C), blocks in p.columns.items():
        kernels.columns[(len(blocks),)](
            p.records, p.numbers, p.scalars, blocks, p.sums, p.partials, p.roots, K=K, P=P, C=C
        )
    kernels.slices[(len(p.slices),)](
        p.records, p.slices, p.partials, p.squares, p.roots, p.found, KB=16, TB=64, BLOCK=1024
    )
    kernels.finish[(count,)](p.records, p.numbers, p.scalars, p.found, p.moves, p.updated, skipped, BLOCK=128)
    tensors = (p.records, p.numbers, varying, p.scalars)
    buffers = (p.sums, p.roots, p.moves, p.updated)
    for launch, blocks in p.applied.items():
        common = {
            "PARAM": kernels.dtype(launch.param),
            "GRAD": kernels.dtype(launch.grad),
            "MOMENTUM": kernels.dtype(launch.momentum) if launch.momentum else None,
            "STOCHASTIC": launch.stochastic,
            "COMPENSATED": launch.compensated,
            "HUGE": launch.huge,
            "ALIGNED": launch.aligned,
        }
        if launch.flat:
            factored, size = launch.tile is not None, triton_table.FLAT_TILE
            kernels.apply_flat[(len(blocks),)](
                *tensors, blocks, *buffers, BLOCK=size, FACTORED=factored, SLICED=launch.sliced, **common
            )
            continue
        assert launch.tile is not None
        tile = launch.tile.of_apply
        stored = (launch.param, launch.grad, launch.momentum, "bfloat16" if launch.compensated else "")
        stages = tile.stages(*(_SIZES[name] for name in stored if name))
        kernels.apply[(len(blocks),)](
            *tensors, blocks, *buffers, K=tile.K, NP=tile.NP, M=tile.M, STAGES=stages, num_warps=tile.warps, **common
        )
