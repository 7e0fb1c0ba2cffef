"""Which backend updates what: native kernels on the CPU, Triton's on a GPU, torch operations anywhere.

``fused=None`` takes the fastest there is, ``True`` insists on kernels, ``False`` on torch operations. Every front end
asks here, for whole parameters and for parts of them.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from operator import is_

import torch
from torch import Tensor

from adafactor.core import native
from adafactor.core.errors import message
from adafactor.engine.torch import accelerator, cpu, cuda
from adafactor.engine.torch.checks import Witness, check_step, has_memory
from adafactor.engine.torch.eager import Eager
from adafactor.engine.torch.triton import forms
from adafactor.engine.torch.work import Backend, Sums, Work


def why_not(device: torch.device) -> str | None:
    """One sentence that says why there are no kernels for tensors on a device, or ``None`` where there are."""
    return native.why_not() if device.type == "cpu" else accelerator.why_not(device)


def check(fused: bool | None, device: torch.device) -> None:
    """Refuse ``fused=True`` where there are no kernels.

    Raises:
        RuntimeError: with the reason.
    """
    if fused:
        cause = why_not(device)
        if cause is not None:
            rule, remedy = "None or False here", f"{cause} Pass fused=None for the fastest kernel there is."
            raise RuntimeError(message(f"fused for {device.type} tensors", rule, fused, remedy))


def kernels_for(w: Work, grad: Tensor | None) -> type[Backend] | None:
    """The kernels that can update it, if any: they want dense memory that they know the shape of.

    A tensor of another class has no address of its own, or another meaning; a gradient of other strides has no form.
    """
    if w.settings.fused is False or not (grad is None or (grad.is_contiguous() and has_memory(grad))):
        return None
    if not all(map(has_memory, (w.param, *(w.state[slot] for slot in w.slots)))):
        return None
    kernels = kernels_on(w.param.device)
    form = cpu.form_of if kernels is cpu.Native else forms.form_of
    return kernels if kernels is not None and form(w) is not None else None


def kernels_on(device: torch.device) -> type[Backend] | None:
    """The kernels for tensors on a device, if there are any."""
    if why_not(device) is not None:
        return None
    return cpu.Native if device.type == "cpu" else cuda.Triton


class Plan:
    """A list of work with the backends that update it.

    Attributes:
        backends: each with the places of its work in the list. What shares memory comes one after the other.
        witness: of the tensors whose addresses backends have taken.
    """

    def __init__(self, work: Sequence[Work], grads: Sequence[Tensor | None]) -> None:
        self.work = work
        self.witness = Witness(work)
        self._params, self._states = [w.param for w in work], [w.state for w in work]
        self.backends: list[tuple[Backend, list[int]]] = []
        self._grads: Sequence[Tensor] = ()
        for places in _apart(work):
            lists: dict[tuple[torch.device, type[Backend]], list[int]] = {}
            for k in places:
                kernels = kernels_for(work[k], grads[k]) or Eager
                lists.setdefault((work[k].param.device, kernels), []).append(k)
            for (_, kernels), members in lists.items():
                self.backends.append((kernels([work[k] for k in members]), members))

    def owns(self, state: Mapping[Tensor, dict[str, Tensor]]) -> bool:
        """Whether the optimizer's state of every parameter is still the dictionary that is written here."""
        pairs = (state.keys(), self._params), (state.values(), self._states)  # mostly in the same order
        if len(state) == len(self.work) and all(all(map(is_, now, then)) for now, then in pairs):
            return True
        return all(state.get(w.param) is w.state for w in self.work)

    def step(self, grads: Sequence[Tensor | None], skipped: Callable[[torch.device], Tensor]) -> None:
        """One update of everything that has a gradient, where there is nothing to reduce."""
        self.check()
        try:
            for backend, places in self.backends:
                here = grads if len(places) == len(grads) else [grads[k] for k in places]
                backend.step(here, skipped(self.work[places[0]].param.device))
        finally:
            self.release()

    def measure(self, grads: Sequence[Tensor]) -> list[Sums]:
        """The sums of all the work, to be completed in place. The gradients live until `release`, for `apply`."""
        self._grads = grads
        sums: dict[int, Sums] = {}
        for backend, places in self.backends:
            sums |= zip(places, backend.measure([grads[k] for k in places]), strict=True)
        return [sums[k] for k in range(len(self.work))]

    def measure_again(self) -> None:
        for backend, _ in self.backends:
            backend.measure_again()

    def finish_columns(self, chosen: Container[int]) -> None:
        """Finish the columns of some of the work, by its places."""
        for backend, places in self.backends:
            backend.finish_columns([k for k, place in enumerate(places) if place in chosen])

    def apply(self, skipped: Callable[[torch.device], Tensor], absent: Container[int]) -> None:
        """Finish and write; what is ``absent`` has no gradient anywhere and is left out."""
        for backend, places in self.backends:
            backend.finish()
            left_out = [k for k, place in enumerate(places) if place in absent]
            backend.apply(skipped(self.work[places[0]].param.device), left_out)

    def check(self) -> None:
        """Refuse, before anything is written, counts of updates that were overwritten in place by what is none."""
        for backend, _ in self.backends:
            if not backend.counts():
                for w in backend.work:
                    check_step(w.state["step"], w.name)

    def release(self) -> None:
        """Let go of the gradients, so that they can be freed."""
        self._grads = ()
        for backend, _ in self.backends:
            backend.release()


def _apart(work: Sequence[Work]) -> Iterator[list[int]]:
    """The places of the work, in lists in which no two parameters share memory."""
    rest = list(range(len(work)))
    while rest:
        first: list[int] = []
        later: list[int] = []
        taken: dict[torch.device, list[tuple[int, int, int]]] = {}
        for k in rest:
            param = work[k].param
            if has_memory(param):
                size = sum((n - 1) * abs(s) for n, s in zip(param.shape, param.stride(), strict=True)) + 1
                begin = param.data_ptr()
                taken.setdefault(param.device, []).append((begin, begin + size * param.element_size(), k))
        shared = set[int]()
        for intervals in taken.values():
            intervals.sort()
            end, owner = 0, -1
            for begin, last, k in intervals:
                if begin < end:
                    shared |= {k, owner}
                if last > end:
                    end, owner = last, k
        kept_one = False
        for k in rest:
            if k in shared and kept_one:
                later.append(k)
            else:
                kept_one = kept_one or k in shared
                first.append(k)
        yield first
        rest = later
