"""The effective learning rate in the hosts' own logs."""

import lightning
import pytest
import torch
import transformers
from lightning.pytorch.loggers import CSVLogger
from small_models import Repeating, small_t5, training_arguments

from adafactor.lightning import EffectiveLR
from adafactor.torch import Adafactor
from adafactor.transformers import log_effective_lr


@pytest.mark.parametrize("tensors", [False, True])
def test_trainer(tensors, tmp_path):
    """In the history, and in what callbacks that report see."""
    seen = []

    class Reports(transformers.TrainerCallback):
        def on_log(self, args, state, control, logs=None, **_):
            seen.append(dict(logs))

    model = small_t5()
    optimizer = Adafactor(model.named_parameters(), lr=1e-2)
    arguments = training_arguments(tmp_path, steps=4, logging_strategy="steps", logging_steps=2)
    trainer = transformers.Trainer(
        model=model, args=arguments, train_dataset=Repeating(), optimizers=(optimizer, None), callbacks=[Reports()]
    )
    log_effective_lr(trainer, tensors)
    trainer.train()
    key = "effective_lr/shared.weight" if tensors else "effective_lr/max"
    for logs in (trainer.state.log_history, seen):
        values = [log[key] for log in logs if "learning_rate" in log]
        assert len(values) == 2
        assert 0 <= values[1] < values[0]
    sizes = {name: float(value) for name, value in optimizer.effective_lr().items()}
    assert seen[1][key] == pytest.approx(sizes["shared.weight"] if tensors else max(sizes.values()))


class Module(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(6, 3)

    def configure_optimizers(self):
        return Adafactor(self.parameters(), lr=0.05)

    def training_step(self, batch, _):
        return self.layer(batch).square().mean()


def test_lightning(tmp_path):
    logger = CSVLogger(tmp_path)
    quiet = {"accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False}
    trainer = lightning.Trainer(
        max_steps=4, log_every_n_steps=2, logger=logger, callbacks=[EffectiveLR()], default_root_dir=tmp_path, **quiet
    )
    trainer.fit(Module(), torch.utils.data.DataLoader(torch.randn(40, 6), batch_size=5))
    logger.save()
    lines = next(tmp_path.rglob("metrics.csv")).read_text().splitlines()
    names = lines[0].split(",")
    assert {"effective_lr/min", "effective_lr/median", "effective_lr/max"} <= set(names)
    largest = [float(line.split(",")[names.index("effective_lr/max")]) for line in lines[1:]]
    assert len(largest) == 2
    assert all(0 < value < 0.05 for value in largest)
