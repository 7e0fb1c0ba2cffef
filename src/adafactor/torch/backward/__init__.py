"""Gradient release: every parameter is stepped in the backward pass, as soon as its gradient is final.

The gradient is freed at once, so that a backward pass holds a few gradients at a time and not all of them. The step is
the one that ``optimizer.step()`` would make, by the same kernels and to the last bit: no parameter's update reads
another's. ``hooks`` are called with gradients, ``passes`` tells which backward pass they are of, ``company`` and
``replicas`` when they are final, and ``handle`` what is then done with them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from torch.nn import Module

from adafactor.core.errors import message
from adafactor.torch.backward import refusals
from adafactor.torch.backward.handle import StepInBackward
from adafactor.torch.backward.norms import Clip, clip_of
from adafactor.torch.optimizer import Adafactor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def step_in_backward(
    model: Module,
    optimizer: Adafactor,
    *,
    loop: Literal["own", "framework"] = "own",
    accumulation_steps: int = 1,
    process_group: ProcessGroup | None = None,
    max_norm: float | None = None,
    clip: Clip = "global",
) -> StepInBackward:
    """Let ``backward()`` step every parameter of the optimizer, and free its gradient.

    There is nothing left to do after ``loss.backward()`` but the scheduler's step. ``docs/low-precision.md`` has an
    example, what it saves, and what does not go together with it; ``docs/loops.md`` is about the arguments.

    Args:
        model: what the optimizer trains, after ``fully_shard`` or ``DistributedDataParallel`` where they are used;
            several models as a ``ModuleList``. Its structure tells which parameters FSDP2 reduces together and which
            layers share weights.
        optimizer: has all its parameters in ``model``; none has a gradient yet.
        loop: who calls ``optimizer.step()``: nobody in a loop of your ``"own"``, where it is refused; a
            ``"framework"`` may, and it steps what still has a gradient, which most often is nothing.
        accumulation_steps: every so many backward passes make one step, with the sum of their gradients. Where a
            framework says which micro-batch is the last (Accelerate, ``no_sync()``), that counts as well.
        process_group: ranks that train copies of ``model`` on batches of their own, without
            ``DistributedDataParallel``: they start from the first rank's weights, and gradients are averaged.
        max_norm: largest norm of the gradients (see ``clip``); ``None`` does not clip.
        clip: ``"global"``: of all together, which takes :meth:`StepInBackward.backward` in place of
            ``loss.backward()``, two passes. ``"tensor"``: of each by itself, at no price.

    Returns:
        A handle: ``remove()``, or the end of a ``with`` block, makes the optimizer an ordinary one again.

    Raises:
        TypeError, ValueError, RuntimeError: the two do not fit, or the model is wrapped in what needs its gradients
            after the backward pass. Nothing has been modified.
    """
    if loop not in ("own", "framework"):
        raise ValueError(message("loop", '"own" or "framework"', loop, "A framework calls optimizer.step() itself."))
    if not isinstance(accumulation_steps, int) or accumulation_steps < 1:
        remedy = "1 steps in every backward pass."
        raise ValueError(message("accumulation_steps", "an integer >= 1", accumulation_steps, remedy))
    clipping = clip_of(max_norm, clip)
    refusals.check(model, refusals.unwrapped(optimizer))
    handle = StepInBackward(model, optimizer, loop == "framework", accumulation_steps, clipping)
    try:
        handle._start(model, process_group)
    except BaseException:
        handle.remove()
        raise
    return handle


__all__ = ["StepInBackward", "step_in_backward"]
