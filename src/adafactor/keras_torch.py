"""Keras variables on the PyTorch backend, handed to the kernels of the PyTorch front end: one call for all of them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from adafactor.factoring import Layout
from adafactor.hyperparameters import Hyperparameters
from adafactor.kernels import aten, native
from adafactor.kernels.native_torch import Step
from adafactor.kernels.work import Kernel, Settings, Work


class Member(NamedTuple):
    """One variable of an update: its place among the optimizer's variables, and the tensors behind it."""

    place: int
    param: Tensor
    grad: Tensor
    layout: Layout
    state: dict[str, Tensor]
    weight_decay: float


class TorchStep:
    """The update of one Keras optimizer's variables, in place."""

    def __init__(self, hyperparameters: Hyperparameters) -> None:
        self._hyperparameters = hyperparameters
        self._work: dict[int, Work] = {}
        self._settings: dict[tuple[float, bool], Settings] = {}
        self._native = Step() if native.available() else None

    def __call__(
        self, members: Iterable[Member], learning_rate: float | Tensor, iterations: Tensor, scheduled: bool
    ) -> None:
        """Update every member; none may be empty.

        Args:
            learning_rate: a number, or a tensor of one element.
            iterations: integer tensor of shape (), the updates made so far.
            scheduled: whether the learning rate varies by itself (eq. 8).
        """
        lists: dict[torch.device, list[Work]] = {}
        for member in members:
            lists.setdefault(member.param.device, []).append(self._item(member, learning_rate, scheduled))
        for device, work in lists.items():
            # The kernels count updates tensor by tensor; Keras counts them once, and by itself.
            counts = iterations.to(device, torch.int64).repeat(len(work)).unbind()
            for item, count in zip(work, counts, strict=True):
                item.state["step"] = count
            kernel: Kernel = self._native if self._native is not None and device.type == "cpu" else aten.step
            kernel(work, torch.zeros((), dtype=torch.int64, device=device))
            for item in work:
                del item.grad

    def _item(self, member: Member, learning_rate: float | Tensor, scheduled: bool) -> Work:
        settings = self._settings.get((member.weight_decay, scheduled))
        if settings is None:
            settings = Settings(
                hyperparameters=self._hyperparameters,
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
        work = self._work.get(member.place)
        if work is None or any(work.state.get(name) is not tensor for name, tensor in member.state.items()):
            work = Work(
                member.param, member.grad, dict(member.state), member.layout, settings, learning_rate, member.place,
                aten.step,
            )  # fmt: skip
            self._work[member.place] = work
        work.param, work.grad, work.settings, work.lr = member.param, member.grad, settings, learning_rate
        return work
