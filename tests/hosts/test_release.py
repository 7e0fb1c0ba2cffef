"""Gradient release in the loops of Trainer, Accelerate and Lightning, which call step() and zero_grad() as always.

The same bits as without it, schedulers and step hooks that run, and few gradients at a time.
"""

import accelerate
import lightning
import pytest
import torch
import transformers
from small_models import Repeating, small_gpt2, training_arguments

import adafactor.lightning
import adafactor.transformers
from adafactor.torch import Adafactor, step_in_backward

CONSTANT = {"relative_step": False, "scale_parameter": False, "lr": 1e-2}


class Watched:
    """The most bytes of gradients alive at once, the one that comes included, and how often ``step`` was called."""

    def __init__(self, model, optimizer):
        self.most = self.steps = 0
        self.params = list(model.parameters())
        for param in self.params:
            param.register_hook(self._come)
        optimizer.register_step_post_hook(self._stepped)

    def _come(self, grad):
        self.most = max(self.most, grad.nbytes + sum(p.grad.nbytes for p in self.params if p.grad is not None))

    def _stepped(self, *_):
        self.steps += 1

    @property
    def largest_two(self):
        return sum(sorted(p.nbytes for p in self.params)[-2:])


def assert_same(runs, steps, accumulation):
    (ordinary, before), (released, watched) = runs
    assert all(torch.equal(p, q) for p, q in zip(ordinary.parameters(), released.parameters(), strict=True))
    assert watched.steps == before.steps == steps
    if accumulation == 1:
        assert watched.most <= watched.largest_two < before.most
    print(f"accumulation {accumulation}: {watched.most} bytes of gradients, {before.most} without release")


@pytest.mark.parametrize("accumulation", [1, 4])
def test_trainer(accumulation, tmp_path):
    """20 steps; with 4, the last step of each epoch of 30 micro-batches has two."""
    runs = []
    for release in (False, True):
        model = small_gpt2()
        optimizer = Adafactor(model.parameters(), **CONSTANT)
        watched = Watched(model, optimizer)
        arguments = training_arguments(
            tmp_path, steps=20, max_grad_norm=0, gradient_accumulation_steps=accumulation,
            lr_scheduler_type="linear", logging_strategy="steps", logging_steps=1,
        )  # fmt: skip
        trainer = transformers.Trainer(
            model=model, args=arguments, train_dataset=Repeating(120), optimizers=(optimizer, None),
            callbacks=[adafactor.transformers.ReleaseGradients()] if release else [],
        )  # fmt: skip
        trainer.train()
        assert [log["learning_rate"] for log in trainer.state.log_history if "learning_rate" in log][-1] < 1e-3
        runs.append((model, watched))
        assert optimizer._in_backward is None
    assert_same(runs, 20, accumulation)


def test_trainer_by_its_own_name_and_resumed(tmp_path):
    """`optim="adafactor"` is ours, released, and goes on from a checkpoint of the middle: the bits of a plain run."""
    runs = []
    with adafactor.transformers.installed(stochastic_rounding=True, seed=0):
        for release, start in ((False, None), (True, None), (True, "checkpoint-5")):
            saving = {"save_strategy": "steps", "save_steps": 5, "optim": "adafactor", "lr_scheduler_type": "constant"}
            trainer = transformers.Trainer(
                model=small_gpt2().bfloat16(), train_dataset=Repeating(),
                args=training_arguments(tmp_path / str(release), max_grad_norm=0, weight_decay=0.1, **saving),
                callbacks=[adafactor.transformers.ReleaseGradients()] if release else [],
            )  # fmt: skip
            trainer.train(resume_from_checkpoint=start and str(tmp_path / "True" / start))
            runs.append(list(trainer.model.parameters()))
            assert type(trainer.optimizer.optimizer).__mro__[1] is adafactor.transformers.Adafactor
    for other in runs[1:]:
        assert all(torch.equal(p, q) for p, q in zip(runs[0], other, strict=True))


def test_trainer_that_clips_is_refused(tmp_path):
    model = small_gpt2()
    trainer = transformers.Trainer(
        model=model, args=training_arguments(tmp_path), train_dataset=Repeating(),
        optimizers=(Adafactor(model.parameters()), None), callbacks=[adafactor.transformers.ReleaseGradients()],
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"^max_grad_norm must be 0 with ReleaseGradients, got 1\.0\. Pass max_norm"):
        trainer.train()


@pytest.mark.parametrize("accumulation", [1, 4])
def test_accelerate(accumulation):
    runs = []
    for release in (False, True):
        runner = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=accumulation)
        model = small_gpt2()
        optimizer = Adafactor(model.parameters(), **CONSTANT)
        watched = Watched(model, optimizer)
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        data = torch.utils.data.DataLoader(Repeating(120), batch_size=4)
        model, optimizer, data, schedule = runner.prepare(model, optimizer, data, schedule)
        released = step_in_backward(model, optimizer, loop="framework") if release else None
        for batch in data:
            with runner.accumulate(model):
                runner.backward(model(**batch).loss)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
        if released is not None:
            released.remove()
        runs.append((model, watched))
        assert optimizer.param_groups[0]["lr"] == pytest.approx(1e-2 * 0.9**watched.steps)
    accelerate.state.AcceleratorState._reset_state(True)
    accelerate.state.GradientState._reset_state()
    assert_same(runs, -(-30 // accumulation), accumulation)


class Module(lightning.LightningModule):
    def __init__(self, manual=False):
        super().__init__()
        self.model = small_gpt2()
        self.automatic_optimization = not manual

    def configure_optimizers(self):
        optimizer = Adafactor(self.parameters(), **CONSTANT)
        self.watched = Watched(self, optimizer)
        return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)}

    def training_step(self, batch, _):
        loss = self.model(**batch).loss
        if not self.automatic_optimization:
            optimizer = self.optimizers()
            self.manual_backward(loss)
            optimizer.step()
            optimizer.zero_grad()
        return loss


def fit(module, path, **more):
    quiet = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = lightning.Trainer(**quiet, default_root_dir=path, **more)
    trainer.fit(module, torch.utils.data.DataLoader(Repeating(120), batch_size=4))
    return trainer


@pytest.mark.parametrize(("accumulation", "manual"), [(1, False), (4, False), (1, True)])
def test_lightning(accumulation, manual, tmp_path):
    runs = []
    for release in (False, True):
        module = Module(manual)
        callbacks = [adafactor.lightning.ReleaseGradients()] if release else []
        more = {} if manual else {"accumulate_grad_batches": accumulation}
        trainer = fit(module, tmp_path / str(release), max_epochs=2, callbacks=callbacks, **more)
        assert trainer.global_step == module.watched.steps
        assert list((tmp_path / str(release)).rglob("*.ckpt"))
        runs.append((module, module.watched))
    assert_same(runs, 2 * -(-30 // accumulation), accumulation)


class Own(lightning.LightningModule):
    """Manual optimization without a call of step(): the backward pass has made it."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.layer = torch.nn.Linear(6, 3)
        self.seen = 0

    def configure_optimizers(self):
        return Adafactor(self.parameters(), lr=0.05)

    def on_train_start(self):
        self.released = step_in_backward(self, self.optimizers())

    def training_step(self, batch, _):
        self.manual_backward(self.layer(batch).square().mean())
        self.seen += 1
        assert self.seen <= 60, "max_steps does not end the run"


def test_lightning_counts_the_steps_of_a_loop_that_calls_none(tmp_path):
    quiet = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    data = torch.utils.data.DataLoader(torch.randn(40, 6), batch_size=5)
    lightning.Trainer(max_epochs=2, default_root_dir=tmp_path, **quiet).fit(Own(), data)
    assert list(tmp_path.rglob("*.ckpt"))
    module = Own()
    lightning.Trainer(max_steps=10, max_epochs=-1, enable_checkpointing=False, **quiet).fit(module, data)
    assert module.seen == 10


def test_lightning_that_clips_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"^gradient_clip_val must be None with ReleaseGradients, got 1\.0"):
        fit(Module(), tmp_path, max_epochs=1, gradient_clip_val=1.0, callbacks=[adafactor.lightning.ReleaseGradients()])
