"""What is done with a gradient that is final, and the handle to it."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from enum import Enum
from threading import RLock
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor
from torch.nn import Module

from adafactor.core.errors import message
from adafactor.engine.torch.work import is_sharded
from adafactor.torch.backward import refusals
from adafactor.torch.backward.company import Company, Modules
from adafactor.torch.backward.hooks import register, unregister
from adafactor.torch.backward.norms import Clipping
from adafactor.torch.backward.passes import Passes
from adafactor.torch.members import Place
from adafactor.torch.optimizer import Adafactor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from adafactor.torch.backward.replicas import Quiet

T = TypeVar("T")


class _Action(Enum):
    """What a backward pass does with gradients."""

    HOLD = "add them up"
    STEP = "step, and free them"
    MEASURE = "take their norms, and free them"
    LATE = "step at its end, when all norms are known"


class StepInBackward:
    """The hooks of ``step_in_backward``, which are there for as long as this or the optimizer is referred to.

    Attributes:
        accumulation_steps: how many backward passes make one step; may be set between two steps.
    """

    def __init__(self, model: Module, wrapped: Any, framework: bool, accumulation_steps: int, clip: Clipping) -> None:
        self._optimizer: Adafactor = refusals.unwrapped(wrapped)
        self._wrapper = None if framework else wrapped
        self._lock = RLock()  # autograd runs a thread per accelerator
        self._passes = Passes()
        self._action = _Action.STEP
        self._forced: _Action | None = None
        self.accumulation_steps, self._clip = accumulation_steps, clip
        self._micro = 0  # passes since the last step
        self._accumulating = self._in_step = self._holds = self._averages = False
        self._looked = self._used = False
        self._seen: set[Place] = set()
        self._late: list[Place] = []
        self._shared = refusals.shared(model)
        own = {param for group in self._optimizer.param_groups for param in group["params"]}
        self._others = [param for param in model.parameters() if param not in own]
        self._quiet: list[Quiet] = []
        self._places: dict[Tensor, Place] = {}
        for number, group in enumerate(self._optimizer.param_groups):
            for position, param in enumerate(group["params"]):
                if param.is_floating_point() or param.is_complex():
                    self._places.setdefault(param, (number, position))
        self._refusal = self._optimizer.register_step_pre_hook(
            lambda optimizer, *_: refusals.refuse_step(optimizer, framework)
        )

    def _start(self, model: Module, group: ProcessGroup | None) -> None:
        self._company = self._company_of(model, group)
        for param, place in self._places.items():
            register(param, self._ready, place)
        optimizer = self._optimizer
        optimizer._in_backward = self
        optimizer._invalidate()
        # GradScaler.step asks for this before it looks for gradients, finds none, and says so in words of its own.
        optimizer._step_supports_amp_scaling = True  # type: ignore[attr-defined]

    def _company_of(self, model: Module, group: ProcessGroup | None) -> Company:
        """Who must have a gradient before it is final.

        Raises:
            ValueError, RuntimeError: ranks, wrappers and arguments do not fit.
        """
        sharded = any(map(is_sharded, self._places))
        wrappers = refusals.wrappers(self._places) if _several_ranks() else []
        if group is None and not wrappers:
            return Modules(model, self._places)
        from adafactor.torch.backward.replicas import Quiet, Replicas, same_weights

        refusals.check_replicas(self._places, wrappers, group, sharded)
        company = Replicas(self._places, group or wrappers[0].process_group)
        if group is not None:
            same_weights(model, group)
        self._quiet = [Quiet(wrapper) for wrapper in wrappers]
        self._averages = True
        return company

    def remove(self) -> None:
        """Take the hooks away: gradients stay, and ``optimizer.step()`` uses them again."""
        self._unhook()
        self._refusal.remove()
        if self._optimizer._in_backward is self:
            self._optimizer._in_backward = None
            self._optimizer._invalidate()
            del self._optimizer._step_supports_amp_scaling  # type: ignore[attr-defined]

    def __del__(self) -> None:
        if not self.__dict__.get("_places") or sys.is_finalizing():
            return
        self._unhook()
        if not self._used:
            text = "step_in_backward has made no step: its optimizer is gone. Keep a reference to it while you train."
            warnings.warn(text, RuntimeWarning, stacklevel=2)

    def _unhook(self) -> None:
        unregister(self._places, self)
        self._places = {}
        for quiet in self._quiet:
            quiet.remove()

    def __enter__(self) -> StepInBackward:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.remove()

    @contextmanager
    def accumulate(self) -> Iterator[None]:
        """A block whose backward passes add to the gradients and step nothing.

        The next backward pass outside of it steps with the sum. Until then all gradients are kept: that part of the
        memory is what it is without gradient release.
        """
        before, self._accumulating = self._accumulating, True
        try:
            yield
        finally:
            self._accumulating = before

    def backward(self, loss: Tensor, gradient: Tensor | None = None, retain_graph: bool = False) -> Tensor | None:
        """``loss.backward()``, and with a ``max_norm`` of all gradients a pass before it that takes their norm.

        The first pass keeps nothing but the norms. There is none where gradients are accumulated, which are there
        until all norms are known.

        Returns:
            The norm before clipping, of shape (); ``None`` where nothing was clipped by it.
        """
        if self._clip.of_all and not self._holds and self._is_last(self._micro + 1):
            norms = self._clip.start()
            with self._forcing(_Action.MEASURE), self._aside() as trained:
                torch.autograd.backward(loss, gradient, retain_graph=True, inputs=trained)
            with self._forcing(_Action.STEP), norms.scaling():
                torch.autograd.backward(loss, gradient, retain_graph)
            return norms.total
        self._clip.total = None
        torch.autograd.backward(loss, gradient, retain_graph)
        return self._clip.total

    @contextmanager
    def _aside(self) -> Iterator[list[Tensor] | None]:
        """A block that gives others no gradient, and what is to have one: ``None`` for all.

        FSDP2's parameters are none that autograd knows, so that they cannot be named: others' are put aside.
        """
        if not any(map(is_sharded, self._places)):
            yield [param for param in self._places if param.requires_grad]
            return
        kept = [(param, param.grad) for param in self._others]
        for param in self._others:
            param.grad = None
        try:
            yield None
        finally:
            for param, grad in kept:
                param.grad = grad

    @contextmanager
    def _forcing(self, action: _Action) -> Iterator[None]:
        self._forced = action
        try:
            yield
        finally:
            self._forced = None

    def _in(self, closure: Callable[[], T]) -> T:
        """Evaluate the closure of ``optimizer.step``: a backward pass in it is the last of its step."""
        self._in_step = True
        try:
            return closure()
        finally:
            self._in_step = False

    def _close(self) -> None:
        """``optimizer.step()`` of a framework: step what still has a gradient."""
        with self._lock:
            if self._holds or any(param.grad is not None for param in self._places):
                self._company.begin()
                self._action = _Action.LATE if self._clip.of_all else _Action.STEP
                self._finish(True)
            self._micro = 0

    def _ready(self, place: Place, param: Tensor) -> None:
        """The hook: a backward pass has added to the gradient of ``param``."""
        with self._lock:
            number, position = place
            if self._optimizer.param_groups[number]["params"][position] is not param:
                remedy = "Call remove() before the groups change, and step_in_backward again afterwards."
                rule = "the parameters that step_in_backward has seen"
                raise RuntimeError(message("the optimizer's groups", rule, "others", remedy))
            if self._passes.follow(self._end):
                self._begin()
            if self._action is _Action.HOLD:
                self._holds = True
                return
            self._check_once(place, param)
            self._take(self._company.arrive(place, param))

    def _begin(self) -> None:
        """A backward pass begins: decide what it does. Nothing of it has been written, and what is wrong is refused."""
        if self.accumulation_steps > 1 or self._clip.of_all or self._averages:
            refusals.check_ends()
        self._seen.clear()
        self._company.begin()
        self._late.clear()
        if not self._looked and _several_ranks():
            refusals.check_wrapped_before(self._places, self._averages)
        self._looked = True
        if self._wrapper is not None and not refusals.accelerate_synchronizes():
            remedy = 'Pass loop="framework" to step_in_backward, which then goes by what Accelerate says.'
            raise RuntimeError(message("gradient_accumulation_steps of Accelerate", "1", "more", remedy))
        if self._forced is not None:
            self._action = self._forced
            self._micro = 0
            return
        self._micro += not self._accumulating
        if self._accumulating or not self._is_last(self._micro):
            self._action = _Action.HOLD
            return
        self._micro = 0
        self._action = _Action.STEP
        if self._clip.of_all:
            if not self._holds:
                remedy = 'Call backward(loss) of what step_in_backward returned, or clip each tensor: clip="tensor".'
                raise RuntimeError(message("max_norm", "None with loss.backward()", self._clip.max_norm, remedy))
            self._action = _Action.LATE

    def _is_last(self, micro: int) -> bool:
        """Whether the micro-batch of this number since the last step makes one."""
        if self._in_step:
            return True
        told = all(quiet.synchronizes for quiet in self._quiet) and refusals.accelerate_synchronizes()
        return told and not self._accumulating and micro >= self.accumulation_steps

    def _check_once(self, place: Place, param: Tensor) -> None:
        """Refuse a second gradient in a pass, which only reentrant checkpoints give: the first was not complete."""
        if self._passes.nested and self._averages:
            used, got = "process", "one of several"
        elif self._passes.nested and id(param) in self._shared:
            used, got = "layer", "several"
        elif place in self._seen:
            used, got = "segment", "a second one in the same backward pass, after the step with the first"
        else:
            self._seen.add(place)
            return
        raise refusals.second_gradient(self._optimizer._name(*place), param, used, got)

    def _end(self, task: int) -> None:
        """The end of a graph task."""
        with self._lock:
            if self._action is _Action.HOLD:
                self._passes.ended(task)
                return
            self._take(self._company.flush())
            if self._passes.ended(task):
                self._finish(self._holds)

    def _finish(self, held: bool) -> None:
        """The end of a backward pass: what has a gradient of an earlier micro-batch only, and what was late."""
        self._take(self._company.finish(held))
        if self._action is _Action.MEASURE:
            return
        self._holds = False
        late, self._late = list(dict.fromkeys(self._late)), []
        if late:
            norms = self._clip.start()
            for place in late:
                norms.measure(place, self._param(place))
            with norms.scaling():
                self._step(late)
        for report in ("_on_before_step", "_on_after_step"):  # how Lightning counts the steps of a loop of one's own
            getattr(self._wrapper, report, bool)()

    def _take(self, ready: Iterable[list[Place]]) -> None:
        """Do with gradients that are final what the pass is for."""
        for places in ready:
            if self._action is _Action.LATE:
                self._late += places
            elif self._action is _Action.MEASURE:
                for place in places:
                    self._clip.measure(place, self._param(place))
                    self._param(place).grad = None
            else:
                self._step(places)

    def _param(self, place: Place) -> Tensor:
        param: Tensor = self._optimizer.param_groups[place[0]]["params"][place[1]]
        return param

    def _step(self, places: list[Place]) -> None:
        for place in places:
            self._clip.apply(self._param(place))
        self._optimizer._update_places(places)
        for place in places:
            self._param(place).grad = None
        self._used = True


def _several_ranks() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()
