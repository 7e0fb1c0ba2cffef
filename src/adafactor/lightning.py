"""Callbacks for Lightning: gradient release, and the effective learning rate in its loggers."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from adafactor.core.errors import message
from adafactor.torch import Adafactor, StepInBackward, step_in_backward
from adafactor.torch.diagnostics import logged


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


class EffectiveLR(Callback):
    """Logs ``effective_lr/min``, ``median`` and ``max`` of every Adafactor, as often as Lightning logs.

    See :meth:`adafactor.torch.Adafactor.effective_lr`. With several optimizers the names end in ``-1``, ``-2``, …

    Args:
        tensors: ``effective_lr/<name>`` of every tensor instead.
    """

    def __init__(self, tensors: bool = False) -> None:
        self.tensors = tensors

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
        if not trainer.loggers or trainer.global_step % every:
            return
        ours = [optimizer for optimizer in trainer.optimizers if isinstance(optimizer, Adafactor)]
        values = {
            name + (f"-{number}" if number else ""): value
            for number, optimizer in enumerate(ours)
            for name, value in logged(optimizer.effective_lr(), self.tensors).items()
        }
        for logger in trainer.loggers if values else ():
            logger.log_metrics(values, step=trainer.global_step)


__all__ = ["EffectiveLR", "ReleaseGradients"]
