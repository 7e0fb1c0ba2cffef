"""The step on the PyTorch backend: all variables of an update in one call to the backends of the PyTorch front end."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import keras
import torch
from keras import ops
from torch import Tensor

from adafactor.core.errors import message
from adafactor.core.hyperparameters import Hyperparameters
from adafactor.engine.torch import checks
from adafactor.engine.torch.choose import Plan
from adafactor.engine.torch.work import Group, Settings, Work, new_diagnostics
from adafactor.keras.step import Member


class TorchStep:
    """The update of one optimizer's variables, in place, and what it keeps from step to step."""

    def __init__(self) -> None:
        self._groups: dict[tuple[float, bool], Group] = {}
        self._plans: dict[tuple[int, ...], tuple[Plan, Tensor]] = {}

    @torch.compiler.disable
    @torch.no_grad()
    def __call__(
        self, members: Iterable[Member], hp: Hyperparameters, learning_rate: Any, iterations: Any, scheduled: bool
    ) -> None:
        """Update every member.

        Args:
            learning_rate: a number, or a tensor or Keras variable of one element.
            iterations: integer variable of shape (), the updates made so far.
            scheduled: whether the learning rate varies by itself (eq. 8).

        Raises:
            RuntimeError: a variable, its gradient or its state does not fit. Nothing has been modified.
        """
        members = list(members)
        if not members:
            return
        if isinstance(learning_rate, keras.Variable):
            learning_rate = learning_rate.value
        for member in members:
            key = (member.weight_decay, scheduled)
            group = self._groups.setdefault(key, Group(_settings(hp, *key), learning_rate))
            group.lr = learning_rate
        grads = [ops.convert_to_tensor(member.gradient) for member in members]
        plan, steps = self._plan(members, grads, scheduled)
        # The backends count updates tensor by tensor; Keras counts them once, and by itself.
        steps.copy_(ops.convert_to_tensor(iterations))
        plan.step(grads, lambda device: torch.zeros((), dtype=torch.int64, device=device))
        for member, w in zip(members, plan.work, strict=True):
            if w.diagnostics is not None:
                values = w.diagnostics[:, :3].reshape(tuple(member.diagnostics.shape))
                member.diagnostics.assign(values.to(torch.float32))

    def _plan(self, members: Sequence[Member], grads: Sequence[Tensor], scheduled: bool) -> tuple[Plan, Tensor]:
        """What updates the members: what there is, as long as nothing it knows has moved."""
        key = tuple(member.position for member in members)
        known = self._plans.get(key)
        params = [member.variable.value for member in members]
        states = [_state(member) for member in members]
        if known is not None:
            work = known[0].work
            same = all(
                w.param is param and all(w.state.get(name) is value for name, value in state.items())
                for w, param, state in zip(work, params, states, strict=True)
            )
            if same and not known[0].witness.moved() and known[0].witness.fits(grads):
                return known
        for member, param, grad in zip(members, params, grads, strict=True):
            checks.check_param(param, member.variable.path)
            checks.check_gradient(param, grad, member.variable.path)
        steps = torch.zeros(len(members), dtype=torch.int64, device=params[0].device)
        work = []
        for member, param, state, step in zip(members, params, states, steps.unbind(), strict=True):
            group = self._groups[member.weight_decay, scheduled]
            layout, name = member.layout, member.variable.path
            if param.device != step.device:
                step = torch.zeros((), dtype=torch.int64, device=param.device)
            state["step"] = step
            changed = checks.fit(param, layout, group.settings, state, name)
            if changed:
                slot = next(iter(changed))
                remedy = "Assign to optimizer variables, and leave their values' shapes, dtypes and devices alone."
                got = f"{state[slot].dtype} of shape {tuple(state[slot].shape)} on {state[slot].device}"
                raise RuntimeError(message(f"{slot} of {name}", "as the optimizer built it", got, remedy))
            diagnostics = None if member.diagnostics is None else new_diagnostics(layout, param.device)
            work.append(Work(param, state, layout, group, member.position, diagnostics, name))
        plan = Plan(work, grads)
        if all(map(torch.Tensor.is_contiguous, grads)):
            self._plans[key] = plan, steps
        return plan, steps


def _state(member: Member) -> dict[str, Tensor]:
    state = {name: slot.value for name, slot in member.slots.items()}
    if member.momentum is not None:
        state["momentum"] = member.momentum.value
    return state


def _settings(hp: Hyperparameters, weight_decay: float, scheduled: bool) -> Settings:
    return Settings(hp, weight_decay, scale_after_decay=True, scheduled=scheduled)
