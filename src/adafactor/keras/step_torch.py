"""The step on the PyTorch backend: all variables of an update in one call to the kernels of the PyTorch front end."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import keras
import torch
from keras import ops
from torch import Tensor

from adafactor.core import native
from adafactor.core.hyperparameters import Hyperparameters
from adafactor.engine.torch import eager
from adafactor.engine.torch.cpu import Step
from adafactor.engine.torch.work import Kernel, Settings, Work, new_report
from adafactor.keras.step import Member


class TorchStep:
    """The update of one optimizer's variables, in place, and what it keeps from step to step."""

    def __init__(self) -> None:
        self._work: dict[int, Work] = {}
        self._settings: dict[tuple[float, bool], Settings] = {}
        self._native = Step() if native.available() else None

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
        """
        if isinstance(learning_rate, keras.Variable):
            learning_rate = learning_rate.value
        lists: dict[torch.device, list[Work]] = {}
        reporting = []
        for member in members:
            if member.report is not None:
                reporting.append(member)
            work = self._item(member, hp, learning_rate, scheduled)
            lists.setdefault(work.param.device, []).append(work)
        done = ops.convert_to_tensor(iterations)
        for device, items in lists.items():
            # The kernels count updates tensor by tensor; Keras counts them once, and by itself.
            counts = done.to(device, torch.int64).repeat(len(items)).unbind()
            for item, count in zip(items, counts, strict=True):
                item.state["step"] = count
            kernel: Kernel = self._native if self._native is not None and device.type == "cpu" else eager.step
            kernel(items, torch.zeros((), dtype=torch.int64, device=device))
            for item in items:
                del item.grad
        for member in reporting:
            values = self._work[member.place].report
            assert values is not None
            member.report.assign(values[:, :3].reshape(tuple(member.report.shape)).to(torch.float32))

    def _item(self, member: Member, hp: Hyperparameters, learning_rate: float | Tensor, scheduled: bool) -> Work:
        settings = self._settings.get((member.weight_decay, scheduled))
        if settings is None:
            settings = Settings(
                hyperparameters=hp,
                weight_decay=member.weight_decay,
                maximize=False,
                momentum_dtype=None,
                stochastic_rounding=False,
                skip_nonfinite=False,
                seed=0,
                scale_after_decay=True,
                scheduled=scheduled,
            )
            self._settings[member.weight_decay, scheduled] = settings
        param, grad = member.variable.value, ops.convert_to_tensor(member.gradient)
        state = {name: slot.value for name, slot in member.slots.items()}
        if member.momentum is not None:
            state["momentum"] = member.momentum.value
        work = self._work.get(member.place)
        if work is None or any(work.state.get(name) is not tensor for name, tensor in state.items()):
            work = Work(param, grad, state, member.layout, settings, learning_rate, member.place, eager.step)
            work.report = None if member.report is None else new_report(member.layout, param.device)
            self._work[member.place] = work
        work.param, work.grad, work.settings, work.lr = param, grad, settings, learning_rate
        return work
