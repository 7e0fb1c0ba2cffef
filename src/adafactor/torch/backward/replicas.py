"""Data parallelism: a gradient is final when all ranks have added it up, in an order that is the same on all of them.

DistributedDataParallel averages gradients in buckets, which stay. Here it has none and is told not to, as in
``no_sync()``: every rank averages them one after the other, one tensor at a time where it is large, neighbours together
where they are small. A rank that has no gradient for a parameter, when another has one, adds zeros.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Module
from torch.nn.parallel import DistributedDataParallel

from adafactor.core.errors import message
from adafactor.engine.torch.sharded.rank_check import check
from adafactor.torch.members import Place

LARGE = 1 << 20  # bytes of what is sent together, at most, or one tensor
_END = -1  # in place of a parameter's number: the first rank's pass has ended


class Replicas:
    """Averages gradients over a process group.

    In the first pass the group's first rank tells the others which gradient is next, as it makes them; that order is
    then everyone's. Who has not got there yet holds its gradients until it has, or until its pass ends.

    Args:
        places: the parameters, every rank's the same.
        group: the ranks.

    Raises:
        RuntimeError: on all ranks, if the parameters are not the same.
    """

    def __init__(self, places: Mapping[Tensor, Place], group: dist.ProcessGroup) -> None:
        self._places, self._group = places, group
        self._params = list(places)
        self._number = {param: number for number, param in enumerate(places)}
        self._order: list[Tensor] = []
        self._device = self._params[0].device
        told = [f"of shape {tuple(p.shape)} and {p.dtype}, {'' if p.requires_grad else 'not '}trained" for p in places]
        check(told, group, self._device, "parameter")
        self.begin()

    def begin(self) -> None:
        self._came: dict[Tensor, None] = {}
        self._absent: list[Tensor] = []
        self._led: dict[Tensor, None] = {}  # averaged in the first pass
        self._next: int | None = None
        self._rest = _together(self._order)

    def arrive(self, place: Place, param: Tensor) -> Iterable[list[Place]]:
        self._came[param] = None
        if not self._order:
            yield from self._follow(False)
        while self._rest and all(member in self._came for member in self._rest[0]):
            yield self._average(self._rest.pop(0))

    def flush(self) -> Iterable[list[Place]]:
        return ()

    def finish(self, held: bool) -> Iterable[list[Place]]:
        """Average what has not come on this rank: held from an earlier pass, or other ranks' alone."""
        if not self._order:
            yield from self._follow(True)
            rest = [param for param in self._params if param not in self._led]
            self._rest = _together(rest)
            if self._led:  # not where all was held, which tells no order
                self._order = [*self._led, *rest]
        late = [place for members in self._rest for place in self._average(members)]
        used = torch.ones(len(self._params), dtype=torch.int32, device=self._device)
        numbers = [self._number[param] for param in self._absent]
        used[numbers] = 0
        dist.all_reduce(used, op=dist.ReduceOp.MAX, group=self._group)
        nowhere = [self._places[self._params[k]] for k in numbers if not used[k]]
        for param in self._absent:
            if self._places[param] in nowhere:
                param.grad = None
        ready = [place for place in late if place not in nowhere]
        if ready:
            yield ready

    def _follow(self, at_end: bool) -> Iterator[list[Place]]:
        """Average what the first rank has, in its order, as far as this rank has it too."""
        while at_end or len(self._led) < len(self._came):
            if self._next is None:
                mine = (self._number[param] for param in self._came if param not in self._led)
                number = torch.tensor(next(mine, _END), device=self._device)
                dist.broadcast(number, dist.get_global_rank(self._group, 0), group=self._group)
                self._next = int(number)
            if self._next == _END or (not at_end and self._params[self._next] not in self._came):
                return
            param, self._next = self._params[self._next], None
            self._led[param] = None
            yield self._average([param])

    def _average(self, members: list[Tensor]) -> list[Place]:
        for param in members:
            if param.grad is None:
                param.grad = torch.zeros_like(param)
                self._absent.append(param)
        grads = [param.grad for param in members if param.grad is not None]
        alone = len(grads) == 1 and grads[0].is_contiguous()
        sent = grads[0] if alone else torch.cat([grad.reshape(-1) for grad in grads])
        sent.div_(self._group.size())
        dist.all_reduce(sent, group=self._group)
        if not alone:
            for grad, part in zip(grads, torch.split(sent, [grad.numel() for grad in grads]), strict=True):
                grad.copy_(part.view(grad.shape))
        return [self._places[param] for param in members]


def _together(order: Iterable[Tensor]) -> list[list[Tensor]]:
    """What is averaged in one call: neighbours of one dtype and device, up to ``LARGE``."""
    buckets: list[list[Tensor]] = []
    size = 0
    for param in order:
        if not param.requires_grad:
            continue
        size += param.nbytes
        last = buckets[-1][0] if buckets else None
        if last is None or size > LARGE or (param.dtype, param.device) != (last.dtype, last.device):
            buckets.append([])
            size = param.nbytes
        buckets[-1].append(param)
    return buckets


class _NoReducer:
    """In the place of DistributedDataParallel's reducer and logger: its buckets are as large as all gradients."""

    strs_map: ClassVar[dict[str, str]] = {}
    ints_map: ClassVar[dict[str, int]] = {}

    def _rebuild_buckets(self) -> bool:
        return False

    def _get_ddp_logging_data(self) -> _NoReducer:  # of Lightning's teardown
        return self

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        remedy = "Call remove() on what step_in_backward returned, which brings it back."
        raise RuntimeError(message("DistributedDataParallel", "left to step_in_backward", f"a call of {name}", remedy))


class Quiet:
    """Keeps a DistributedDataParallel from averaging, and knows what it was told to do.

    Its reducer is let go, with the buckets, and made anew when this is removed.

    Attributes:
        synchronizes: whether gradients of the latest forward pass were to be averaged; not under ``no_sync()``.
    """

    def __init__(self, wrapper: DistributedDataParallel) -> None:
        self.synchronizes = True
        me = weakref.ref(self)

        def before(wrapper: DistributedDataParallel, inputs: Any) -> None:
            quiet = me()
            if quiet is not None and torch.is_grad_enabled():
                quiet.synchronizes, wrapper.require_backward_grad_sync = wrapper.require_backward_grad_sync, False

        def after(wrapper: DistributedDataParallel, inputs: Any, output: Any) -> None:
            quiet = me()
            if quiet is not None and torch.is_grad_enabled():
                wrapper.require_backward_grad_sync = quiet.synchronizes
                wrapper.require_forward_param_sync = quiet.synchronizes  # of buffers

        its: Any = wrapper
        its.reducer = its.logger = _NoReducer()
        self._wrapper = weakref.ref(wrapper)
        self._handles = [
            wrapper.register_forward_pre_hook(before),
            wrapper.register_forward_hook(after, always_call=True),
        ]

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        wrapper: Any = self._wrapper()
        if wrapper is not None and dist.is_initialized() and isinstance(wrapper.reducer, _NoReducer):
            params, sparse = wrapper._build_params_for_reducer()
            names = wrapper._build_debug_param_to_name_mapping(params)
            wrapper._ddp_init_helper(params, sparse, names, wrapper.static_graph)


def same_weights(model: Module, group: dist.ProcessGroup) -> None:
    """Give every rank the weights and buffers of the group's first, as DistributedDataParallel does."""
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            dist.broadcast(tensor, dist.get_global_rank(group, 0), group=group)
