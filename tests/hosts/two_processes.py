"""What the ranks of test_two_processes.py run: the hosts' own DistributedDataParallel, with and without release."""

from __future__ import annotations

import os
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import accelerate
import lightning
import torch
import torch.distributed as dist
import transformers
from lightning.fabric.plugins.environments import LightningEnvironment
from lightning.pytorch.strategies import DDPStrategy
from torch.nn.parallel import DistributedDataParallel

import adafactor.lightning
import adafactor.transformers
from adafactor.torch import Adafactor, step_in_backward

CONSTANT = {"relative_step": False, "scale_parameter": False, "lr": 1e-2}


def trainer(release: bool, accumulation: int) -> torch.nn.Module:
    from small_models import Repeating, small_gpt2, training_arguments

    model = small_gpt2()
    optimizer = Adafactor(model.parameters(), **CONSTANT)
    with TemporaryDirectory() as folder:
        arguments = training_arguments(
            folder, steps=6, max_grad_norm=0, gradient_accumulation_steps=accumulation,
            ddp_find_unused_parameters=False, ddp_backend="gloo",
        )  # fmt: skip
        running = transformers.Trainer(
            model=model, args=arguments, train_dataset=Repeating(40), optimizers=(optimizer, None),
            callbacks=[adafactor.transformers.ReleaseGradients()] if release else [],
        )  # fmt: skip
        running.train()
    assert isinstance(running.model_wrapped, DistributedDataParallel)
    return model


def with_accelerate(release: bool, accumulation: int) -> torch.nn.Module:
    from small_models import Repeating, small_gpt2

    runner = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=accumulation)
    inner = small_gpt2()
    optimizer = Adafactor(inner.parameters(), **CONSTANT)
    data = torch.utils.data.DataLoader(Repeating(44), batch_size=4)
    model, optimizer, data = runner.prepare(inner, optimizer, data)
    assert isinstance(model, DistributedDataParallel)
    released = step_in_backward(model, optimizer, loop="framework") if release else None
    for batch in data:
        with runner.accumulate(model):
            runner.backward(model(**batch).loss)
            optimizer.step()
            optimizer.zero_grad()
    if released is not None:
        released.remove()
    return inner


class Module(lightning.LightningModule):
    def __init__(self) -> None:
        from small_models import small_gpt2

        super().__init__()
        self.model = small_gpt2()

    def configure_optimizers(self) -> Adafactor:
        return Adafactor(self.parameters(), **CONSTANT)

    def training_step(self, batch: Any, _: int) -> torch.Tensor:
        loss: torch.Tensor = self.model(**batch).loss
        return loss


def with_lightning(release: bool, accumulation: int) -> torch.nn.Module:
    from small_models import Repeating

    module = Module()
    with TemporaryDirectory() as folder:
        running = lightning.Trainer(
            accelerator="cpu", devices=2, max_epochs=1, accumulate_grad_batches=accumulation, logger=False,
            strategy=DDPStrategy(cluster_environment=LightningEnvironment(), process_group_backend="gloo"),
            callbacks=[adafactor.lightning.ReleaseGradients()] if release else [], enable_progress_bar=False,
            enable_model_summary=False, enable_checkpointing=False, default_root_dir=Path(folder),
        )  # fmt: skip
        running.fit(module, torch.utils.data.DataLoader(Repeating(40), batch_size=4))
    return module


def everything(rank: int, world: int) -> dict[str, Any]:
    """Per host: the largest relative difference that release makes, and whether replicas are the same."""
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "NODE_RANK": 0}
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29511"}  # unused, since the process group is there
    with patch.dict(os.environ, {name: str(value) for name, value in {**place, **where}.items()}):
        return compared(world)


def compared(world: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for run in (trainer, with_accelerate, with_lightning):
        for accumulation in (1, 2):
            ordinary, released = (run(release, accumulation) for release in (False, True))
            mine = torch.cat([p.detach().flatten() for p in released.parameters()])
            everyone = [torch.empty_like(mine) for _ in range(world)]
            dist.all_gather(everyone, mine)
            pairs = zip(ordinary.parameters(), released.parameters(), strict=True)
            found[f"{run.__name__}, {accumulation}"] = (
                max(((p - q).norm() / p.norm()).item() for p, q in pairs),
                all(torch.equal(mine, other) for other in everyone),
            )
    return found
