"""Flat parameters, what ZeRO and FSDP1 leave of tensors that were flattened, concatenated and cut, as work.

Every box of an interval (`core/intervals.py`) is work like any other part, whose sums `flat_step.py` completes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from adafactor.core.factoring import Layout, Shape
from adafactor.core.intervals import Flat, Interval
from adafactor.engine.torch.checks import check_float_momentum, fitted
from adafactor.engine.torch.work import Work, slot_dtype, slots_of


@dataclass(frozen=True)
class Span:
    """One tensor of which a flat parameter has an interval.

    Attributes:
        name: what errors call it.
        shape: of the whole tensor.
        intervals: what every process holds of it, flattened.
        at: where this process's interval begins in its flat parameter.
    """

    name: str
    shape: Shape
    intervals: tuple[Interval, ...]
    at: int


@dataclass(frozen=True)
class Spans:
    """What a flat parameter holds.

    Attributes:
        spans: the tensors, on every process the same in the same order.
        group: the processes that hold the rest of them; ``None`` where there is no rest.
    """

    spans: tuple[Span, ...]
    group: dist.ProcessGroup | None

    @property
    def rank(self) -> int:
        """Which of the processes this is."""
        return 0 if self.group is None else dist.get_rank(self.group)


@dataclass(frozen=True, slots=True, eq=False)
class FlatParam:
    """This process's part of the tensors in one flat parameter.

    Attributes:
        draft: the flat parameter, of one axis, and what is said of it; ``spans``: what it holds.
        flats: where every tensor's interval lies; ``works``: of every tensor those of its boxes.
        state: what the optimizer keeps of it: as in `work.Work`, of every tensor the part around its interval, each
            flattened, and concatenated. ``step`` has one number per tensor, and shape () of one tensor alone.
    """

    draft: Work
    spans: Spans
    flats: list[Flat]
    works: list[list[Work]]
    state: dict[str, Tensor]

    @property
    def param(self) -> Tensor:
        return self.draft.param

    @property
    def gathered(self) -> tuple[str, ...]:
        """The slots that engines cannot put together: those of other shapes, or that some tensors do not have."""
        return (*(("step",) if len(self.flats) > 1 else ()), "row", "column", "second_moment")

    @property
    def slots(self) -> tuple[str, ...]:
        return tuple(self.state)

    def owns(self, state: Mapping[str, Any]) -> bool:
        """Whether the optimizer's state of it is still this."""
        return not state or all(state.get(slot) is tensor for slot, tensor in self.state.items())


def flat_param(
    draft: Work, spans: Spans, layout_of: Callable[[Shape, str], Layout], state: Mapping[str, Any]
) -> FlatParam:
    """The work of a flat parameter, with zeros for the state that it has not yet. Nothing is written.

    Args:
        draft: the parameter, and what is said of it besides tensors and layout.
        layout_of: the layout of a tensor of a shape and a name.
        state: what the optimizer keeps of it.

    Raises:
        RuntimeError: the state does not fit, or cannot be kept for intervals.
    """
    param, settings = draft.param, draft.settings
    check_float_momentum("a flat parameter", settings)
    flats = [Flat(layout_of(span.shape, span.name), span.intervals, spans.rank) for span in spans.spans]
    held: dict[str, Tensor] = {}
    ours: dict[str, Sequence[Tensor]] = {}
    for slot in ("step", *dict.fromkeys(slot for flat in flats for slot in flat.given.slots)):
        sizes = [1 if slot == "step" else flat.kept(slot) for flat in flats]
        shape = () if slot == "step" and len(flats) == 1 else (sum(sizes),)
        held[slot] = _fitted(draft, slot, shape, state.get(slot))
        ours[slot] = torch.split(held[slot].view(-1), sizes)
    extra = [slot for slot in slots_of(flats[0].given, settings, param.dtype) if slot in ("momentum", "residual")]
    for slot in extra:
        held[slot] = _fitted(draft, slot, tuple(param.shape), state.get(slot))
    works = []
    for k, (flat, span) in enumerate(zip(flats, spans.spans, strict=True)):
        names = {"row": "column", "column": "row"} if flat.transposed else {}
        mine: list[Work] = []
        ends = list(accumulate((box.size for box in flat.boxes), initial=span.at))
        for box, begin, end in zip(flat.boxes, ends, ends[1:], strict=False):
            its = {"step": held["step"].new_zeros(())}
            if flat.given.factored:
                its |= {names.get(slot, slot): ours[slot][k] for slot in flat.given.slots}
                for side, lengths in (("row", box.row_shape), ("column", box.column_shape)):
                    whole, place = flat.within(box, side)
                    its[side] = its[side].view(whole)[place].view(lengths)
            else:
                its["second_moment"] = ours["second_moment"][k][begin - span.at : end - span.at].view(box.shape)
            its |= {slot: held[slot][begin:end].view(box.shape) for slot in extra}
            local = param.detach()[begin:end].view(box.shape)
            stream = draft.rng_stream + (k << 32)
            made = Work(local, its, box, draft.group, stream, None if mine else draft.diagnostics, span.name)
            mine.append(made)
        works.append(mine)
    return FlatParam(draft, spans, flats, works, held)


def _fitted(draft: Work, slot: str, shape: Shape, value: Any) -> Tensor:
    return fitted(value, slot, draft.param, (shape, slot_dtype(slot, draft.settings, draft.param.dtype)), draft.name)
