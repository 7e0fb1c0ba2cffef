"""What gradient release cannot do: told before anything is written."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.nn import Module
from torch.nn.parallel import DistributedDataParallel

from adafactor.core.errors import message
from adafactor.engine.torch.checks import is_flat
from adafactor.torch.backward.hooks import is_hooked
from adafactor.torch.optimizer import Adafactor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

# Wrappers whose step is the optimizer's, with the bookkeeping of a loop around it.
_WRAPPERS = ("accelerate.optimizer", "lightning.pytorch.core.optimizer", "pytorch_lightning.core.optimizer")


def unwrapped(optimizer: Any) -> Any:
    """The optimizer inside of Accelerate's and Lightning's wrappers."""
    while any(kind.__module__ in _WRAPPERS for kind in type(optimizer).__mro__):
        optimizer = optimizer.optimizer
    return optimizer


def check(model: object, optimizer: object) -> None:
    """Refuse what can be known beforehand.

    Raises:
        TypeError, ValueError, RuntimeError: model and optimizer do not fit.
    """
    if not isinstance(model, Module):
        remedy = "Pass the model itself; several as a torch.nn.ModuleList."
        raise TypeError(message("model", "a torch.nn.Module", type(model).__name__, remedy))
    if not isinstance(optimizer, Adafactor):
        remedy = "Pass the optimizer itself; Accelerate's and Lightning's wrappers of it are understood."
        raise TypeError(message("optimizer", "an adafactor.torch.Adafactor", type(optimizer).__name__, remedy))
    if optimizer._in_backward is not None:
        remedy = "Call remove() on what the first call returned."
        raise RuntimeError(message("step_in_backward", "called once per optimizer", "a second call", remedy))
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
            if is_hooked(param):
                gc.collect()  # an optimizer that nobody refers to takes its hooks with it
            if is_hooked(param):
                remedy = "Call remove() on what step_in_backward returned for the other."
                got = f"one of shape {tuple(param.shape)} that another steps"
                raise RuntimeError(message("a parameter", "stepped by one optimizer", got, remedy))
            if param.grad is not None:
                remedy = "Call optimizer.step() or optimizer.zero_grad() first; accumulate() is for micro-batches."
                got = f"one of shape {tuple(param.shape)}"
                raise RuntimeError(message("a gradient before step_in_backward", "None", got, remedy))


def wrappers(params: Iterable[Tensor]) -> list[DistributedDataParallel]:
    """Every DistributedDataParallel around one of the parameters, which do not tell: all objects are looked at."""
    known = set(map(id, params))
    return [
        thing
        for thing in gc.get_objects()
        if issubclass(type(thing), DistributedDataParallel) and any(id(p) in known for p in thing.parameters())
    ]


def check_replicas(
    params: Iterable[Tensor], wrappers: list[DistributedDataParallel], group: ProcessGroup | None, sharded: bool
) -> None:
    """Refuse what cannot be averaged one parameter at a time.

    Raises:
        ValueError, RuntimeError: with the argument or the wrapper that does not fit.
    """
    if group is not None and (wrappers or sharded):
        there = "DistributedDataParallel" if wrappers else "sharded parameters"
        remedy = "Leave it out: they bring their own."
        raise ValueError(message("process_group", f"None beside {there}", "a group", remedy))
    inside: set[int] = set()
    for wrapper in wrappers:
        own = {
            "static_graph": wrapper.static_graph,
            "mixed_precision": wrapper.mixed_precision is not None,
            "a communication hook": bool(wrapper._comm_hooks),
            "a process group of its own": wrapper.process_group != wrappers[0].process_group,
        }
        for name, there_is in own.items():
            if there_is:
                remedy = "step_in_backward averages gradients itself, in their own dtype; leave that out."
                raise RuntimeError(message("DistributedDataParallel", "without ways of its own", name, remedy))
        ignored = wrapper.parameters_to_ignore
        inside |= {id(p) for name, p in wrapper.module.named_parameters() if name not in ignored}
    for param in params if wrappers else ():
        if id(param) not in inside:
            remedy = "Wrap a module that holds all of them, or make the optimizer without it."
            got = f"one of shape {tuple(param.shape)} outside of it"
            raise RuntimeError(message("a parameter of the optimizer", "in DistributedDataParallel", got, remedy))


def check_wrapped_before(params: Iterable[Tensor], averaged: bool) -> None:
    """Refuse a DistributedDataParallel that came after ``step_in_backward``: the backward pass is its already."""
    if not averaged and wrappers(params):
        remedy = "Call step_in_backward after it was wrapped."
        rule = "wrapped in DistributedDataParallel before step_in_backward"
        raise RuntimeError(message("model", rule, "one wrapped afterwards", remedy))


def refuse_step(optimizer: Any, of_a_framework: bool) -> None:
    """Before ``optimizer.step``: refuse it, unless a loop was said to call it.

    Raises:
        RuntimeError: it was not, or the gradients were scaled.
    """
    if hasattr(optimizer, "grad_scale"):
        remedy = "bfloat16 needs none; for float16, call remove() on what step_in_backward returned."
        raise RuntimeError(message("GradScaler", "left out with step_in_backward", "a scaled loss", remedy))
    if not of_a_framework:
        remedy = (
            "Leave it out, and clip_grad_norm_ too, which finds no gradients: backward() has made the step. Or pass "
            'loop="framework", or call remove() on what step_in_backward returned.'
        )
        raise RuntimeError(message("optimizer.step", "left out with step_in_backward", "a call", remedy))


def check_ends() -> None:
    """Refuse, under compiled autograd, what must know when a backward pass ends: it does not tell.

    Raises:
        RuntimeError: the pass is compiled.
    """
    if getattr(sys.modules.get("torch._dynamo.compiled_autograd"), "in_compiled_autograd_region", False):
        remedy = "Leave out accumulation_steps, max_norm and several processes, or compile the forward pass alone."
        raise RuntimeError(message("torch.compile", "without compiled autograd", "compiled autograd", remedy))


def accelerate_synchronizes() -> bool:
    """What Accelerate says of the micro-batch that runs: whether it is the last of its step."""
    state = getattr(sys.modules.get("accelerate.state"), "GradientState", None)
    return state is None or bool(state._shared_state.get("sync_gradients", True))


def second_gradient(name: str, param: Tensor, used: str, got: str) -> RuntimeError:
    """A reentrant checkpoint gives a gradient per segment, and the first was not final."""
    remedy = "Pass use_reentrant=False to torch.utils.checkpoint, which adds up the gradients of all uses first."
    rule = f"used in one {used} only under torch.utils.checkpoint(use_reentrant=True)"
    return RuntimeError(message(f"{name} of shape {tuple(param.shape)}", rule, got, remedy))


def shared(model: Module) -> set[int]:
    """Parameters that the model has in more than one place, by id."""
    seen: set[int] = set()
    again: set[int] = set()
    for _, param in model.named_parameters(remove_duplicate=False):
        (again if id(param) in seen else seen).add(id(param))
    return again
