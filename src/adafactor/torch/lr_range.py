"""Which learning rate to begin with: a few steps with each of several, from the same weights on the same batches."""

from __future__ import annotations

import math
import random
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice, pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from adafactor.core.errors import message
from adafactor.torch.optimizer import Adafactor

GRID = tuple(10 ** (k / 2) for k in range(-8, 1))  # 1e-4 to 1, two per decade
HELD = 8  # batches that measure the loss and train nothing


@dataclass(frozen=True, slots=True)
class LRRange:
    """What :func:`lr_range_test` has measured. Its ``str`` is a drawing.

    Attributes:
        lrs: the learning rates.
        losses: the loss after training with each, over the same batches; inf or NaN where it broke down.
        before: the loss before.
        noise: how much of a difference between two losses may be chance: two standard errors, over the batches.
        lr: the one to begin with, or ``None`` where the losses do not say.
        reason: in one sentence.
    """

    lrs: tuple[float, ...]
    losses: tuple[float, ...]
    before: float
    noise: float
    lr: float | None
    reason: str

    def __str__(self) -> str:
        finite = [loss for loss in self.losses if math.isfinite(loss)]
        low, high = min([self.before, *finite]), self.before
        lines = [f"loss after training, {self.before:.4g} before"]
        for lr, loss in zip(self.lrs, self.losses, strict=True):
            share = (high - loss) / (high - low) if high > low and math.isfinite(loss) else 0.0
            bar = "#" * round(50 * max(0.0, share))
            lines.append(f"{lr:9.3g} {loss:10.4g} {bar}{'  <' if lr == self.lr else ''}")
        return "\n".join([*lines, self.reason])


def lr_range_test(
    model: Module,
    optimizer: Adafactor,
    batches: Iterable[Any],
    loss_of: Callable[[Module, Any], Tensor],
    *,
    lrs: Sequence[float] = GRID,
    steps: int = 20,
) -> LRRange:
    """Train a few steps with each learning rate, and propose the one that gets furthest.

    Every learning rate begins with the same weights, state, batches and random numbers. Afterwards all of these, and
    the model's buffers and gradients, are what they were to the bit, also when it is interrupted.

    Args:
        model, optimizer: as for training. Groups with learning rates of their own keep their ratios to the largest.
        batches: ``steps + 8`` are read.
        loss_of: the loss, of shape (), of a model on a batch.
        lrs: rising learning rates.
        steps: updates with each. A few dozen tell the order of magnitude; the more, the nearer to a long run.

    Raises:
        TypeError, ValueError, RuntimeError: an argument does not fit. Nothing has been modified.
    """
    if len(lrs) < 3 or any(not 0 < a < b for a, b in pairwise(lrs)):
        raise ValueError(message("lrs", "three or more rising numbers > 0", list(lrs), "Leave it out for the default."))
    if not isinstance(optimizer, Adafactor):
        raise TypeError(
            message("optimizer", "an adafactor.torch.Adafactor", type(optimizer).__name__, "Pass it itself.")
        )
    if optimizer._in_backward is not None or optimizer._host is not None:
        name = "step_in_backward" if optimizer._host is None else "HostStep"
        raise RuntimeError(message("optimizer", f"without {name}", "one with it", f"Call it before {name}."))
    largest = max(float(group["lr"]) for group in optimizer.param_groups)
    if not largest > 0:
        raise ValueError(message("lr of the optimizer", "> 0", largest, "Groups keep their ratios to the largest."))
    with _restored(model, optimizer) as restore:
        given = list(islice(batches, steps + HELD))
        if len(given) < HELD + 1:
            raise ValueError(message("batches", f"at least {HELD + 1}", len(given), f"{steps + HELD} are wanted."))
        held, training = given[:HELD], given[HELD:]
        before = _measure(model, held, loss_of)
        measured = []
        for lr in lrs:
            restore()
            for group in optimizer.param_groups:
                group["lr"] = group["lr"] * (lr / largest)
            measured.append(_train(model, optimizer, training, loss_of) and _measure(model, held, loss_of))
    return _judged(tuple(lrs), measured, before)


def _train(model: Module, optimizer: Adafactor, batches: list[Any], loss_of: Callable[[Module, Any], Tensor]) -> bool:
    """Whether the loss stayed finite."""
    for batch in batches:
        optimizer.zero_grad()
        loss = loss_of(model, batch)
        if not math.isfinite(loss.item()):
            return False
        torch.autograd.backward(loss)
        optimizer.step()
    return True


@torch.no_grad()
def _measure(model: Module, batches: list[Any], loss_of: Callable[[Module, Any], Tensor]) -> list[float]:
    return [loss_of(model, batch).item() for batch in batches]


def _judged(lrs: tuple[float, ...], measured: list[Any], before: list[float]) -> LRRange:
    """The proposal, if the losses support one."""
    losses = [sum(each) / len(each) if each else math.inf for each in measured]
    start = sum(before) / len(before)
    order = [k for k, loss in enumerate(losses) if math.isfinite(loss)]
    best = min(order, key=losses.__getitem__) if order else 0
    noise = 2 * _error(measured[best], before) if order else math.nan
    lr: float | None = lrs[best]
    if not order:
        lr, reason = None, "No learning rate kept the loss finite: try smaller ones."
    elif not losses[best] < start - noise:
        lr, reason = None, "No learning rate lowers the loss by more than chance: more steps, or larger batches."
    elif best in (0, len(lrs) - 1):
        lr, reason = None, f"The loss falls towards the {'first' if best == 0 else 'last'} learning rate: go beyond it."
    elif all(_alike(measured[k], measured[best]) for k in order):
        lr, reason = None, "All learning rates do alike, up to chance: more steps."
    else:
        reason = f"{lr:.3g} lowers the loss from {start:.4g} to {losses[best]:.4g}."
    return LRRange(lrs, tuple(losses), start, noise, lr, reason)


def _error(a: Sequence[float], b: Sequence[float]) -> float:
    """The standard error of the mean difference."""
    differences = [x - y for x, y in zip(a, b, strict=True)]
    mean = sum(differences) / len(differences)
    return math.sqrt(sum((d - mean) ** 2 for d in differences) / (len(differences) - 1) / len(differences))


def _alike(a: Sequence[float], b: Sequence[float]) -> bool:
    return abs(sum(a) - sum(b)) / len(a) <= 2 * _error(a, b)


@contextmanager
def _restored(model: Module, optimizer: Adafactor) -> Iterator[Callable[[], None]]:
    """A block after which everything is what it was before; it is given what restores it in between."""
    params = [param for group in optimizer.param_groups for param in group["params"]]
    held = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers(), *params)}.values()
    grads = [(tensor, tensor.grad) for tensor in held]
    own: list[Any] = [*optimizer.param_groups, optimizer._skipped, optimizer._diagnostics, optimizer._lrs]
    dictionaries = [(of, dict(of)) for of in own if of is not None]
    state = {param: dict(slots) for param, slots in optimizer.state.items()}
    modes = [(module, module.training) for module in model.modules()]
    written = [*held, *(grad for _, grad in grads)]
    for of in (*state.values(), *(saved for _, saved in dictionaries)):
        written += of.values()
    copies = [(tensor, tensor.detach().clone()) for tensor in written if isinstance(tensor, Tensor)]
    random_numbers = _random_numbers()

    @torch.no_grad()
    def restore() -> None:
        for tensor, saved in copies:
            tensor.copy_(saved)
        for tensor, grad in grads:
            tensor.grad = grad
        for of, words in dictionaries:
            of.clear()
            of.update(words)
        optimizer.state.clear()
        optimizer.state.update({param: dict(slots) for param, slots in state.items()})
        optimizer._invalidate()
        for module, training in modes:
            module.training = training
        random_numbers()

    try:
        yield restore
    finally:
        restore()


def _random_numbers() -> Callable[[], None]:
    """What brings the random numbers of Python, NumPy and PyTorch back."""
    numpy = sys.modules.get("numpy")
    python, of_numpy = random.getstate(), numpy.random.get_state() if numpy else None
    cpu = torch.get_rng_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None  # type: ignore[no-untyped-call]

    def restore() -> None:
        random.setstate(python)
        if numpy:
            numpy.random.set_state(of_numpy)
        torch.set_rng_state(cpu)
        if cuda is not None:
            torch.cuda.set_rng_state_all(cuda)

    return restore


__all__ = ["LRRange", "lr_range_test"]
