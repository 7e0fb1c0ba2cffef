"""Users' paths, run for real and small: a plain loop, transformers' Trainer, Accelerate, Lightning."""

import accelerate
import lightning
import pytest
import torch
from small_models import Repeating, small_t5, training_arguments
from transformers import Trainer

from adafactor.torch import Adafactor

T5 = {"lr": 1e-3, "relative_step": False, "scale_parameter": False}


def loss_of(model: torch.nn.Module) -> float:
    batch = torch.utils.data.default_collate(list(Repeating()))
    with torch.no_grad():
        return model(**batch).loss.item()


def test_plain_loop():
    model, data = small_t5(), torch.utils.data.DataLoader(Repeating(), batch_size=16)
    optimizer = Adafactor(model.parameters(), lr=0.1)
    before = loss_of(model)
    for _ in range(5):
        for batch in data:
            optimizer.zero_grad()
            model(**batch).loss.backward()
            optimizer.step()
    assert loss_of(model) < 0.9 * before


def test_trainer(tmp_path):
    model = small_t5()
    before = loss_of(model)
    trainer = Trainer(
        model=model,
        args=training_arguments(tmp_path, learning_rate=1e-2),
        train_dataset=Repeating(),
        optimizer_cls_and_kwargs=(Adafactor, {**T5, "lr": 1e-2}),
    )
    trainer.train()
    assert type(trainer.optimizer.optimizer) is Adafactor
    assert loss_of(model) < 0.9 * before


def test_trainer_goes_on_with_the_checkpoint_of_its_own_adafactor(tmp_path):
    """The first run uses `optim="adafactor"`; the second reads its optimizer.pt with our class."""
    saving = {"learning_rate": 1e-2, "lr_scheduler_type": "constant"}
    arguments = training_arguments(tmp_path, optim="adafactor", **saving)
    arguments.save_strategy, arguments.save_steps = "steps", 5
    whole = Trainer(model=small_t5(), args=arguments, train_dataset=Repeating())
    whole.train()
    ours = Trainer(
        model=small_t5(),
        args=training_arguments(tmp_path, **saving),
        train_dataset=Repeating(),
        optimizer_cls_and_kwargs=(Adafactor, {**T5, "lr": 1e-2}),
    )
    ours.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    for a, b in zip(ours.model.parameters(), whole.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_accelerate(accumulation, tmp_path):
    runner = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=accumulation)
    model = small_t5()
    before = loss_of(model)
    optimizer = Adafactor(model.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, total_iters=10)
    data = torch.utils.data.DataLoader(Repeating(), batch_size=16)
    model, optimizer, data, schedule = runner.prepare(model, optimizer, data, schedule)
    for _ in range(6):
        for batch in data:
            with runner.accumulate(model):
                runner.backward(model(**batch).loss)
                runner.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
    assert loss_of(model) < 0.9 * before
    runner.save_state(str(tmp_path))
    saved = [p.detach().clone() for p in model.parameters()]
    model(**batch).loss.backward()
    optimizer.step()
    runner.load_state(str(tmp_path))
    assert all(torch.equal(p, s) for p, s in zip(model.parameters(), saved, strict=True))
    assert {int(s["step"]) for s in optimizer.optimizer.state.values()} == {24 // accumulation}


class Module(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.model = small_t5()

    def training_step(self, batch: dict[str, torch.Tensor], _: int) -> torch.Tensor:
        return self.model(**batch).loss

    def configure_optimizers(self) -> dict[str, object]:
        optimizer = Adafactor(self.parameters(), lr=0.1, beta1=0.5)
        return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.99)}


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_lightning(precision, tmp_path):
    module = Module()
    before = loss_of(module.model)
    quiet = {
        "accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False,
        "default_root_dir": tmp_path, "precision": precision,
    }  # fmt: skip
    data = torch.utils.data.DataLoader(Repeating(), batch_size=16)
    trainer = lightning.Trainer(max_epochs=4, gradient_clip_val=1.0, **quiet)
    trainer.fit(module, data)
    assert loss_of(module.model) < 0.9 * before
    checkpoint = next(tmp_path.rglob("*.ckpt"))
    again = Module()
    resumed = lightning.Trainer(max_epochs=5, **quiet)
    resumed.fit(again, data, ckpt_path=str(checkpoint))
    assert {int(s["step"]) for s in resumed.optimizers[0].state.values()} == {20}
