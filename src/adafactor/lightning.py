"""Gradient release in Lightning's loops."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from adafactor.core.errors import message
from adafactor.torch import Adafactor, StepInBackward, step_in_backward


class ReleaseGradients(Callback):
    """Let Lightning's backward passes step every :class:`adafactor.torch.Adafactor`; its loop stays what it is.

    Args:
        options: of :func:`adafactor.torch.step_in_backward`, ``max_norm`` with ``clip="tensor"`` say.
    """

    def __init__(self, **options: Any) -> None:
        self._options = options
        self._released: list[StepInBackward] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Raises ValueError: Lightning would clip gradients, and find none."""
        if trainer.gradient_clip_val:
            remedy = 'Pass max_norm=... and clip="tensor" to ReleaseGradients, or leave it to the optimizer (d).'
            raise ValueError(
                message("gradient_clip_val", "None with ReleaseGradients", trainer.gradient_clip_val, remedy)
            )
        self._released = [
            step_in_backward(pl_module, optimizer, loop="framework", **self._options)
            for optimizer in trainer.optimizers
            if isinstance(optimizer, Adafactor)
        ]

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if pl_module.automatic_optimization:
            for released in self._released:
                released.accumulation_steps = trainer.accumulate_grad_batches

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        for released in self._released:
            released.remove()
        self._released = []


__all__ = ["ReleaseGradients"]
