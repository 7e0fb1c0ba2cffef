"""Flat parameters, what ZeRO and FSDP1 leave of tensors that were flattened, concatenated and cut, as work.

Every box of an interval (`core/intervals.py`) is work like any other part, whose sums `reducer.py` completes.
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
from adafactor.core.intervals import FlatPlacement, Interval
from adafactor.engine.torch.checks import check_float_momentum, fitted
from adafactor.engine.torch.sharded.held import Held, Sharded
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


def sharded(draft: Work, spans: Spans, layout_of: Callable[[Shape, str], Layout], state: Mapping[str, Any]) -> Sharded:
    """What this process holds of a flat parameter, with zeros for the state that it has not yet. Nothing is written.

    The state has of every tensor the part around its interval, each flattened, and concatenated. ``step`` has one
    number per tensor, and shape () of one tensor alone.

    Args:
        draft: the parameter, and what is said of it besides tensors and layout.
        layout_of: the layout of a tensor of a shape and a name.
        state: what the optimizer keeps of it.

    Raises:
        RuntimeError: the state does not fit, or cannot be kept for intervals.
    """
    param, settings = draft.param, draft.settings
    check_float_momentum("a flat parameter", settings)
    placements = [FlatPlacement(layout_of(its.shape, its.name), its.intervals, spans.rank) for its in spans.spans]
    kept: dict[str, Tensor] = {}
    ours: dict[str, Sequence[Tensor]] = {}
    for slot in ("step", *dict.fromkeys(slot for its in placements for slot in its.given.slots)):
        sizes = [1 if slot == "step" else its.kept(slot) for its in placements]
        kept[slot] = _fitted(draft, slot, () if slot == "step" and len(sizes) == 1 else (sum(sizes),), state)
        ours[slot] = torch.split(kept[slot].view(-1), sizes)
    extra = [slot for slot in slots_of(draft.layout, settings, param.dtype) if slot in ("momentum", "residual")]
    kept |= {slot: _fitted(draft, slot, tuple(param.shape), state) for slot in extra}
    tensors, begins = [], list[int]()
    for k, (placement, span) in enumerate(zip(placements, spans.spans, strict=True)):
        given, works = placement.given, list[Work]()
        ends = list(accumulate((box.size for box in placement.parts), initial=span.at))
        for box, begin, end in zip(placement.parts, ends, ends[1:], strict=False):
            held = {"step": ours["step"][k].view(()) if begin == span.at else kept["step"].new_zeros(())}
            for slot in given.slots:
                here = placement.here(slot)
                if given.factored:
                    shape, place = placement.in_hull(box, here)
                    held[here] = ours[slot][k].view(shape)[place].view(box.slots[here])
                else:
                    held[here] = ours[slot][k][begin - span.at : end - span.at].view(box.shape)
            held |= {slot: kept[slot][begin:end].view(box.shape) for slot in extra}
            stream, diagnostics = draft.rng_stream + (k << 32), None if works else draft.diagnostics
            local = param.detach()[begin:end].view(box.shape)
            works.append(Work(local, held, box, draft.group, stream, diagnostics, span.name))
            begins.append(begin)
        sides = f"rows {given.rows}, columns {given.columns}"
        told = f"{span.name} {span.shape} of {param.dtype} cut at {span.intervals}, {sides}"
        tensors.append(Held(placement, works, told))
    return Sharded(draft, param, kept, kept, tensors, None, spans.group, begins)


def _fitted(draft: Work, slot: str, shape: Shape, state: Mapping[str, Any]) -> Tensor:
    wanted = shape, slot_dtype(slot, draft.settings, draft.param.dtype)
    return fitted(state.get(slot), slot, draft.param, wanted, draft.name)
