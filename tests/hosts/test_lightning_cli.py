"""Lightning's command line names the class and the callbacks by their paths."""

import lightning
import pytest
import torch

from adafactor.lightning import ReleaseGradients
from adafactor.torch import Adafactor

pytest.importorskip("jsonargparse")


class Module(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(6, 3)

    def training_step(self, batch, _):
        return self.layer(batch).square().mean()

    def train_dataloader(self):
        return torch.utils.data.DataLoader(torch.randn(40, 6), batch_size=5)


def test_fit(tmp_path):
    from lightning.pytorch.cli import LightningCLI

    quiet = {"logger": "false", "accelerator": "cpu", "enable_progress_bar": "false", "enable_checkpointing": "false"}
    trainer = {**quiet, "max_epochs": "1", "default_root_dir": str(tmp_path)}
    arguments = [f"--trainer.{name}={value}" for name, value in trainer.items()]
    arguments += ["--optimizer=adafactor.torch.Adafactor", "--optimizer.lr=0.01", "--optimizer.relative_step=false"]
    arguments += ["--optimizer.factoring=smallest", "--optimizer.eps=[1e-30, 1e-4]"]
    arguments += ["--trainer.callbacks+=adafactor.lightning.ReleaseGradients"]
    cli = LightningCLI(Module, args=["fit", *arguments], save_config_callback=None)
    (optimizer,) = cli.trainer.optimizers
    assert type(optimizer) is Adafactor
    group = optimizer.param_groups[0]
    assert (group["lr"], group["relative_step"], group["factoring"]) == (0.01, False, "smallest")
    assert any(isinstance(callback, ReleaseGradients) for callback in cli.trainer.callbacks)
    assert {int(state["step"]) for state in optimizer.state.values()} == {8}
