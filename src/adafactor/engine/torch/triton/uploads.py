"""The tables of the Triton kernels on the device, complete with addresses, and the buffers between the kernels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeVar, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from adafactor.core.factoring import Part
from adafactor.engine.torch import accelerator
from adafactor.engine.torch.blocks import kept
from adafactor.engine.torch.cpu import globalise
from adafactor.engine.torch.triton import table
from adafactor.engine.torch.triton.forms import form_of, in_kernel, launch_of
from adafactor.engine.torch.triton.table import FIELDS, FLAGS, NUMBERS
from adafactor.engine.torch.work import Group, Sums, Work

K = TypeVar("K")
_FIELD = {name: number for number, name in enumerate(FIELDS)}


class Uploaded:
    """Whatever the launches of a list of work are told but gradients, learning rates and the sums over parts.

    Args:
        dtypes, aligned: of the gradients.
        at_once: whether all verbs may be one launch.

    Attributes:
        described: each tensor as the tables know it; ``plan``: what follows from that.
        groups: places of learning rates; ``settings``: what the groups said.
        records to on_chip: the plan's, on the device.
        scalars to varying: buffers; ``varying`` holds the addresses of gradients, then learning rates.
        of_graph: made in a capture, whose uploads wait for a replay: no eager step may read these tables.
        tensors: all that lives on the device, and the copies on the host that a captured upload reads again.
    """

    def __init__(
        self, work: Sequence[Work], dtypes: Sequence[torch.dtype], aligned: NDArray[np.bool_], at_once: bool
    ) -> None:
        self.device, self.of_graph = work[0].param.device, accelerator.is_capturing()
        forms = [form_of(w) for w in work]
        self.described = [
            table.Tensor(in_kernel(form), launch_of(w, form, dtype, bool(its), at_once))
            for w, form, dtype, its in zip(work, forms, dtypes, aligned, strict=True)
            if form is not None
        ]
        self.plan = plan = table.tables(self.described)
        self.groups = list({id(w.group): w.group for w in work}.values())
        self.settings = [group.settings for group in self.groups]
        self.tensors: list[Tensor] = []
        numbers = _complete(plan.records, work, self.described, self.groups)
        self.records, self.numbers, self.slices = map(self._upload, (plan.records, numbers, plan.slices))
        self.measured, self.applied = self._upload_all(plan.measure), self._upload_all(plan.apply)
        self.columns, self.on_chip = self._upload_all(plan.columns), self._upload_all(plan.on_chip)
        self.cuts = {key[3] for key in plan.columns}
        self.count = count = len(work)
        slices, sizes = len(plan.slices), plan.sizes
        self.scalars, self.updated = self._buffer(4 * count), self._buffer(count, torch.int64)
        self.partials, self.squares = self._buffer(3 * sizes["partials"]), self._buffer(sizes["squares"])
        self.roots, self.slice_sums, self.moves = map(self._buffer, (sizes["roots"], 3 * slices, 2 * slices))
        self.varying = self._buffer(count + len(self.groups), torch.int64)

    def _upload(self, array: NDArray[Any]) -> Tensor:
        source = accelerator.pinned(array, self.device)
        target = self._buffer(array.size, source.dtype)[: array.size].view(source.shape)
        accelerator.send(target, source)
        self.tensors.append(source)
        return target

    def _upload_all(self, table: Mapping[K, NDArray[Any]]) -> dict[K, Tensor]:
        return {key: self._upload(blocks) for key, blocks in table.items()}

    def _buffer(self, size: int, dtype: torch.dtype = torch.float32) -> Tensor:
        made = torch.empty(max(size, 1), dtype=dtype, device=self.device)
        self.tensors.append(made)
        return made

    def serve(self, capturing: bool) -> bool:
        """Whether a step can read them, for all that groups say now."""
        said = zip(self.groups, self.settings, strict=True)
        return (capturing or not self.of_graph) and all(group.settings is then for group, then in said)

    def of_slices(self, k: int) -> Tensor:
        """The sum of u², Q and a check of each slice of a tensor."""
        first = self.plan.records[k, _FIELD["slice"]]
        return self.slice_sums.view(-1, 3)[first : first + self.described[k].form.slices]


def _complete(
    records: NDArray[np.int64], work: Sequence[Work], described: Sequence[table.Tensor], groups: Sequence[Group]
) -> NDArray[np.float64]:
    """Complete the records with addresses and what the user has said; returns the numbers."""
    numbers = np.zeros((len(work), len(NUMBERS)))
    rates = {id(group): number for number, group in enumerate(groups)}
    for k, (w, tensor) in enumerate(zip(work, described, strict=True)):
        form, state, settings = tensor.form, w.state, w.settings
        hp = settings.hyperparameters
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
            "lr": rates[id(w.group)],
            "seed": settings.seed - (1 << 64 if settings.seed >> 63 else 0),
            "rng_stream": w.rng_stream,
        }
        if isinstance(w.layout, Part):
            swapped = tensor.launch.transposed
            globalise(cast(Any, said), w.layout.transposed if form.transposed or swapped else w.layout)
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
            records[k, _FIELD[name]] = value
        numbers[k] = (
            hp.beta_2_decay,
            0.0 if hp.beta_2_max is None else 1.0 - hp.beta_2_max,
            hp.epsilon_1,
            hp.epsilon_2,
            table.NO_CLIP if hp.clip_threshold is None else hp.clip_threshold,
            settings.weight_decay,
            hp.momentum or 0.0,
        )
    return numbers


class Buffered(NamedTuple):
    """The sums of a factored tensor where the kernels have them, as views.

    Attributes:
        row_sums: of a part that is cut along both sides; else the rows.
        partials: what `columns` leaves of each matrix and tile.
    """

    rows: Tensor
    row_sums: Tensor
    S: Tensor
    partials: Tensor
    root_mu: Tensor


def views(tables: Uploaded, sums: Tensor, work: Sequence[Work]) -> tuple[list[Sums], dict[int, Buffered]]:
    """The buffers as tensors, in the shapes of `Sums`: what is written there is what finish reads.

    Of a part that is cut along both sides S is a copy: the second measurement writes its own.
    """
    given: list[Sums] = []
    buffered: dict[int, Buffered] = {}
    for k, (w, tensor) in enumerate(zip(work, tables.described, strict=True)):
        layout = w.layout
        record = dict(zip(FIELDS, tables.plan.records[k].tolist(), strict=True))
        u2, Q, _ = (column.view(kept(layout, layout.whole)) for column in tables.of_slices(k).unbind(1))
        if not tensor.form.factored:
            given.append(Sums(None, None, u2, Q))
            continue
        matrices, parts, m, tiles = record["matrices"], record["parts"], record["m"], record["tiles"]
        S, W = (
            sums.as_strided((matrices, m), (parts * m, 1), record["sums"] + half * matrices * parts * m).view(
                kept(layout, layout.rows)
            )
            for half in (0, 1)
        )
        both = tensor.launch.cut == "both"
        rows, row_sums = (
            sums[record[name] :][: matrices * record["n"]].view(kept(layout, layout.columns))
            for name in ("finished", "row_totals" if both else "finished")
        )
        partials = tables.partials.view(-1, 3)[record["partial"] :][: matrices * tiles].view(-1, tiles, 3)
        buffered[k] = Buffered(rows, row_sums, S, partials, tables.roots[record["root_mu"] :][:matrices])
        given.append(Sums(rows, torch.empty_like(S) if both else S, W, Q))
    return given, buffered
