"""Gradient release: every parameter is stepped in the backward pass, as soon as its gradient is complete.

The gradient is freed at once, so that a backward pass holds a few gradients at a time and not all of them. The step is
the one that ``optimizer.step()`` would make, by the same kernels and to the last bit: no parameter's update reads
another's.
"""

from __future__ import annotations

import gc
import sys
import warnings
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import RLock
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Variable
from torch.nn import Module
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import CheckpointFunction

from adafactor.core.errors import message
from adafactor.engine.torch.checks import is_flat
from adafactor.engine.torch.work import is_sharded
from adafactor.torch.optimizer import Adafactor

Place = tuple[int, int]  # group, and position in the group


def step_in_backward(model: Module, optimizer: Adafactor) -> StepInBackward:
    """Let ``backward()`` step every parameter of the optimizer, and free its gradient.

    There is nothing left to do after ``loss.backward()`` but the scheduler's step. ``docs/low-precision.md`` has an
    example, what it saves, and what does not go together with it.

    Args:
        model: what the optimizer trains, after ``fully_shard`` where that is used; several models as a
            ``ModuleList``. Its structure tells which parameters FSDP2 reduces together and which layers share weights.
        optimizer: has all its parameters in ``model``; none has a gradient yet.

    Returns:
        A handle: ``remove()``, or the end of a ``with`` block, makes the optimizer an ordinary one again.

    Raises:
        TypeError, ValueError, RuntimeError: the two do not fit, or the model is wrapped in what needs its gradients
            after the backward pass. Nothing has been modified.
    """
    return StepInBackward(model, optimizer)


@dataclass(eq=False)
class _Bucket:
    """Parameters whose gradients come together, those of one FSDP2 module: stepped together, in one all-reduce."""

    members: list[Tensor] = field(default_factory=list)
    ready: list[Place] = field(default_factory=list)

    @property
    def full(self) -> bool:
        return len(self.ready) >= sum(param.requires_grad for param in self.members)


class _Hook:
    """What a parameter calls when its gradient is complete.

    It must not hold what holds the parameter: Python's collector does not see through a parameter to its hooks.
    """

    def __init__(self, owner: StepInBackward, place: Place) -> None:
        self._owner, self._place = weakref.ref(owner), place

    @property
    def owner(self) -> StepInBackward | None:
        return self._owner()

    def __call__(self, param: Tensor) -> None:
        if self.owner is not None:
            self.owner._ready(self._place, param)


class _UntracedHook(_Hook):
    """The same where the compiler is loaded: compiled autograd would trace into the step."""

    def __init__(self, owner: StepInBackward, place: Place) -> None:
        super().__init__(owner, place)
        self._call = torch.compiler.disable(super().__call__)  # type: ignore[no-untyped-call]

    def __call__(self, param: Tensor) -> None:
        self._call(param)


class StepInBackward:
    """The hooks of :func:`step_in_backward`, which are there for as long as this or the optimizer is referred to."""

    def __init__(self, model: Module, optimizer: Adafactor) -> None:
        _check(model, optimizer)
        self._optimizer = optimizer
        self._lock = RLock()  # autograd runs a thread per accelerator
        self._accumulating = self._holds = self._looked = self._used = False
        # The backward pass: its parameters so far, its graph tasks that have not ended, and the latest of all tasks.
        self._seen: set[Place] = set()
        self._open: set[int] = set()
        self._task = self._latest = -1
        self._nested = False
        self._buckets = _buckets(model)
        self._waiting: _Bucket | None = None
        self._shared = _shared(model)
        self._params: list[Tensor] = []
        self._refusal = optimizer.register_step_pre_hook(_refuse_step)
        places: dict[Tensor, Place] = {}
        for number, group in enumerate(optimizer.param_groups):
            for position, param in enumerate(group["params"]):
                if param.is_floating_point() or param.is_complex():
                    places.setdefault(param, (number, position))
        hook = _UntracedHook if "torch._dynamo" in sys.modules else _Hook  # which takes a second to import
        for param, place in places.items():
            bucket = self._buckets.get(param)
            if bucket is not None:
                bucket.members.append(param)
            _register(param, hook(self, place))
            self._params.append(param)
        self.lists = len(places)
        optimizer._in_backward = self
        optimizer._invalidate()
        # GradScaler.step asks for this before it looks for gradients, finds none, and says so in words of its own.
        optimizer._step_supports_amp_scaling = True  # type: ignore[attr-defined]

    def remove(self) -> None:
        """Take the hooks away: gradients stay, and ``optimizer.step()`` uses them again."""
        self._unhook()
        self._refusal.remove()
        if self._optimizer._in_backward is self:
            self._optimizer._in_backward = None
            self._optimizer._invalidate()
            del self._optimizer._step_supports_amp_scaling  # type: ignore[attr-defined]

    def __del__(self) -> None:
        if not self.__dict__.get("_params") or sys.is_finalizing():
            return
        self._unhook()
        if not self._used:
            text = "step_in_backward has made no step: its optimizer is gone. Keep a reference to it while you train."
            warnings.warn(text, RuntimeWarning, stacklevel=2)

    def _unhook(self) -> None:
        for param in self._params:
            hooks = param._post_accumulate_grad_hooks
            for key in [key for key, hook in hooks.items() if isinstance(hook, _Hook) and hook.owner in (self, None)]:
                del hooks[key]
        self._params.clear()

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

    def _ready(self, place: Place, param: Tensor) -> None:
        """The hook: the gradient of ``param`` is complete."""
        with self._lock:
            if self._accumulating:
                self._holds = True
                return
            number, position = place
            if self._optimizer.param_groups[number]["params"][position] is not param:
                remedy = "Call remove() before the groups change, and step_in_backward again afterwards."
                rule = "the parameters that step_in_backward has seen"
                raise RuntimeError(message("the optimizer's groups", rule, "others", remedy))
            self._follow(torch._C._current_graph_task_id())
            self._check_once(place, param)
            bucket = self._buckets.get(param)
            if bucket is None:
                self._step([place])
                return
            if self._waiting is not bucket:
                self._flush()
            self._waiting = bucket
            bucket.ready.append(place)
            if bucket.full:
                self._flush()

    def _follow(self, task: int) -> None:
        """Note which backward pass this is, and ask to be told of its end.

        A checkpoint with ``use_reentrant=True`` runs a graph task inside another. Tasks are counted, and a pass begins
        with a task of its own: what directly follows a task and runs in a checkpoint belongs to the same pass.
        """
        if task == self._task:
            return
        self._task = task
        if task in self._open:  # back from a nested task
            self._nested = False
            return
        self._nested = _in_checkpoint()
        if not (self._nested and task == self._latest + 1):
            self._check_surroundings()
            self._seen.clear()
            self._open.clear()
            if self._waiting is not None:  # of a pass that an error has ended
                self._waiting.ready.clear()
                self._waiting = None
        self._latest = max(self._latest, task)
        if not self._nested:
            self._open.add(task)
        Variable._execution_engine.queue_callback(lambda: self._end(task))

    def _check_once(self, place: Place, param: Tensor) -> None:
        """Refuse a second gradient in a pass, which only reentrant checkpoints give: the first was not complete."""
        remedy = "Pass use_reentrant=False to torch.utils.checkpoint, which adds up the gradients of all uses first."
        what = f"{self._optimizer._called(*place)} of shape {tuple(param.shape)}"
        if self._nested and id(param) in self._shared:
            rule = "used in one layer only under torch.utils.checkpoint(use_reentrant=True)"
            raise RuntimeError(message(what, rule, "several", remedy))
        if place in self._seen:
            rule = "used in one segment only under torch.utils.checkpoint(use_reentrant=True)"
            got = "a second one in the same backward pass, after the step with the first"
            raise RuntimeError(message(what, rule, got, remedy))
        self._seen.add(place)

    def _check_surroundings(self) -> None:
        """Refuse, before a pass writes anything, what cannot be known when the hooks are made."""
        state = getattr(sys.modules.get("accelerate.state"), "GradientState", None)
        if state is not None and not state._shared_state.get("sync_gradients", True):
            remedy = "Use accumulate() of what step_in_backward returned, and leave Accelerator.accumulate out."
            raise RuntimeError(message("gradient_accumulation_steps of Accelerate", "1", "more", remedy))
        if not self._looked and torch.distributed.is_available() and torch.distributed.is_initialized():
            _check_replicas({id(p) for group in self._optimizer.param_groups for p in group["params"]})
        self._looked = True

    def _end(self, task: int) -> None:
        """The end of a graph task."""
        with self._lock:
            self._flush()
            self._task = -1  # another FSDP2 model may reduce its last gradients after this, with an end of its own
            if task in self._open:
                self._open.discard(task)
                if self._holds:  # what has a gradient of an earlier micro-batch only
                    self._holds = False
                    groups = enumerate(self._optimizer.param_groups)
                    self._step([(n, k) for n, g in groups for k, p in enumerate(g["params"]) if p.grad is not None])

    def _flush(self) -> None:
        bucket, self._waiting = self._waiting, None
        if bucket is not None:
            ready, bucket.ready = bucket.ready, []
            self._step(ready)

    def _step(self, places: list[Place]) -> None:
        optimizer = self._optimizer
        by_group: dict[int, list[int]] = {}
        for number, position in places:
            by_group.setdefault(number, []).append(position)
        with torch.no_grad():
            optimizer._update(list(by_group.items()))
        for number, position in places:
            optimizer.param_groups[number]["params"][position].grad = None
        self._used = True
        optimizer._opt_called = True  # type: ignore[attr-defined]  # what a scheduler looks for before it steps


def _check(model: object, optimizer: object) -> None:
    """Refuse what can be known beforehand."""
    if not isinstance(model, Module):
        remedy = "Pass the model itself; several as a torch.nn.ModuleList."
        raise TypeError(message("model", "a torch.nn.Module", type(model).__name__, remedy))
    if not isinstance(optimizer, Adafactor):
        remedy = "Pass the optimizer itself: of Accelerate's wrapper, its attribute `optimizer`."
        raise TypeError(message("optimizer", "an adafactor.torch.Adafactor", type(optimizer).__name__, remedy))
    if optimizer._in_backward is not None:
        remedy = "Call remove() on what the first call returned."
        raise RuntimeError(message("step_in_backward", "called once per optimizer", "a second call", remedy))
    for module in model.modules():
        if isinstance(module, DistributedDataParallel):
            raise _replicas("a model with a DistributedDataParallel in it")
    known = set(map(id, model.parameters()))
    for group in optimizer.param_groups:
        for param in group["params"]:
            if is_flat(param):
                remedy = "Use fully_shard (FSDP2), whose parameters keep their shapes; docs/sharding.md shows how."
                raise RuntimeError(message("model", "without FSDP1 for Adafactor", "FullyShardedDataParallel", remedy))
            if id(param) not in known:
                remedy = "Pass the model that holds it; several as a torch.nn.ModuleList."
                got = f"one of shape {tuple(param.shape)} outside of it"
                raise ValueError(message("a parameter of the optimizer", "a parameter of the model", got, remedy))
            if _is_hooked(param):
                gc.collect()  # an optimizer that nobody refers to takes its hooks with it
            if _is_hooked(param):
                remedy = "Call remove() on what step_in_backward returned for the other."
                got = f"one of shape {tuple(param.shape)} that another steps"
                raise RuntimeError(message("a parameter", "stepped by one optimizer", got, remedy))
            if param.grad is not None:
                remedy = "Call optimizer.step() or optimizer.zero_grad() first; accumulate() is for micro-batches."
                got = f"one of shape {tuple(param.shape)}"
                raise RuntimeError(message("a gradient before step_in_backward", "None", got, remedy))


def _is_hooked(param: Tensor) -> bool:
    return any(isinstance(hook, _Hook) for hook in (param._post_accumulate_grad_hooks or {}).values())


def _refuse_step(optimizer: Any, arguments: Any, keywords: Any) -> None:
    """Before ``optimizer.step``: refuse it."""
    if hasattr(optimizer, "grad_scale"):
        remedy = "bfloat16 needs none; for float16, call remove() on what step_in_backward returned."
        raise RuntimeError(message("GradScaler", "left out with step_in_backward", "a scaled loss", remedy))
    remedy = (
        "Leave it out, and clip_grad_norm_ too, which finds no gradients: backward() has made the step. Or call "
        "remove() on what step_in_backward returned."
    )
    raise RuntimeError(message("optimizer.step", "left out with step_in_backward", "a call", remedy))


def _replicas(got: str) -> RuntimeError:
    remedy = "Its buckets keep all gradients until they are averaged: use fully_shard, on a mesh of its own choice."
    return RuntimeError(message("model", "without DistributedDataParallel for step_in_backward", got, remedy))


def _check_replicas(params: set[int]) -> None:
    """Refuse DDP, which averages gradients after the hooks have run. It leaves no trace on a parameter that Python
    can see, so all objects are looked at, once.
    """
    for thing in gc.get_objects():
        if issubclass(type(thing), DistributedDataParallel) and any(id(p) in params for p in thing.parameters()):
            raise _replicas("a DistributedDataParallel around its parameters")


def _register(param: Tensor, hook: _Hook) -> None:
    """Also where the parameter is frozen, since it may be unfrozen."""
    frozen = not param.requires_grad
    if frozen:
        param.requires_grad_(True)
    try:
        param.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]
    finally:
        if frozen:
            param.requires_grad_(False)


def _in_checkpoint() -> bool:
    """Whether a reentrant checkpoint is on the stack: this backward pass runs inside another."""
    frame = sys._getframe()
    while frame.f_back is not None:
        frame = frame.f_back
        if frame.f_code is CheckpointFunction.backward.__code__:
            return True
    return False


def _buckets(model: Module) -> dict[Tensor, _Bucket]:
    """The FSDP2 module of every sharded parameter."""
    fsdp = getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", None)
    found: dict[Tensor, _Bucket] = {}

    def visit(module: Module, bucket: _Bucket | None) -> None:
        if fsdp is not None and isinstance(module, fsdp):
            bucket = _Bucket()
        for param in module.parameters(recurse=False):
            if bucket is not None and is_sharded(param):
                found.setdefault(param, bucket)
        for child in module.children():
            visit(child, bucket)

    visit(model, None)
    return found


def _shared(model: Module) -> set[int]:
    """Parameters that the model has in more than one place, by id."""
    found: set[int] = set()
    shared: set[int] = set()
    for _, param in model.named_parameters(remove_duplicate=False):
        (shared if id(param) in found else found).add(id(param))
    return shared


__all__ = ["StepInBackward", "step_in_backward"]
