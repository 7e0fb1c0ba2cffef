"""`optim="adafactor"` is ours after one line: the same numbers, and each resumes from the other's checkpoints."""

import copy
import sys
from types import ModuleType

import pytest
import torch
import transformers
from small_models import Repeating, small_t5, training_arguments
from torch_support import parameters, train
from transformers.optimization import Adafactor as Theirs

import adafactor.torch
from adafactor.transformers import Adafactor, _home, install, installed

SHAPES = [(6, 4), (2, 3, 5), (7,)]
T5 = {"relative_step": False, "scale_parameter": False, "lr": 1e-3}
RECIPES = {
    "default": {},
    "T5": T5,
    "clipping, decay": {**T5, "clip_threshold": 0.5, "decay_rate": -0.5},
    "weight decay": {**T5, "weight_decay": 0.1},
    "scaled": {**T5, "scale_parameter": True},
    "warm-up": {"warmup_init": True},
    "epsilons": {"eps": (1e-4, 1e-1)},
}


def run(path, **more):
    arguments = training_arguments(path, steps=50, optim="adafactor", learning_rate=1e-3, weight_decay=0.01, **more)
    return transformers.Trainer(model=small_t5(), args=arguments, train_dataset=Repeating())


def difference(model, other):
    return max(((p - q).norm() / q.norm()).item() for p, q in zip(model.parameters(), other.parameters(), strict=True))


def test_an_unmodified_script_and_both_ways_to_resume(tmp_path):
    """50 steps with a schedule, weight decay and gradient clipping; each goes on from the other's step 25."""
    saving = {"save_strategy": "steps", "save_steps": 25}
    trainers = {}
    for name in ("theirs", "ours"):
        (tmp_path / name).mkdir()
        if name == "theirs":
            trainers[name] = run(tmp_path / name, **saving)
            trainers[name].train()
        else:
            with installed():
                trainers[name] = run(tmp_path / name, **saving)
                trainers[name].train()
    assert type(trainers["ours"].optimizer.optimizer) is Adafactor
    assert type(trainers["theirs"].optimizer.optimizer) is Theirs
    theirs = trainers["theirs"].model
    found = {"from the start": difference(trainers["ours"].model, theirs)}
    for name, other in (("ours", "theirs"), ("theirs", "ours")):
        if name == "ours":
            with installed():
                resumed = run(tmp_path / "resumed")
                resumed.train(resume_from_checkpoint=str(tmp_path / other / "checkpoint-25"))
        else:
            resumed = run(tmp_path / "resumed")
            resumed.train(resume_from_checkpoint=str(tmp_path / other / "checkpoint-25"))
        assert resumed.state.global_step == 50
        found[f"{name} from {other}"] = difference(resumed.model, theirs)
    print(transformers.__version__, found)
    assert max(found.values()) < 1e-5


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_arguments_and_checkpoints_mean_what_they_meant(recipe):
    ours, theirs = parameters(SHAPES), parameters(SHAPES)
    a, b = Adafactor(ours, **recipe), Theirs(theirs, **recipe)
    for optimizer in (a, b):
        train(optimizer, 10)
    change = Theirs(ours, **recipe), Adafactor(theirs, **recipe)
    change[0].load_state_dict(a.state_dict())
    if recipe.get("warmup_init"):
        with pytest.warns(UserWarning, match="warmup_init"):
            change[1].load_state_dict(b.state_dict())
    else:
        change[1].load_state_dict(b.state_dict())
    for optimizer in change:
        train(optimizer, 10, seed=1)
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    "options", [{}, {"beta1": 0.9}, {"stochastic_rounding": True, "seed": 3}, {"compensated": True}]
)
def test_our_own_checkpoints_resume_bit_for_bit(options):
    whole, params = parameters(SHAPES, torch.bfloat16), parameters(SHAPES, torch.bfloat16)
    a, b = Adafactor(whole, **T5, **options), Adafactor(params, **T5, **options)
    train(a, 3)
    train(b, 3)
    again = Adafactor(params, **T5)
    again.load_state_dict(copy.deepcopy(b.state_dict()))
    train(a, 3, seed=1)
    train(again, 3, seed=1)
    assert all(torch.equal(p, q) for p, q in zip(whole, params, strict=True))


def test_options_of_ours():
    with installed(stochastic_rounding=True):
        made, arguments = transformers.Trainer.get_optimizer_cls_and_kwargs(
            training_arguments("unused", optim="adafactor")
        )
        optimizer = made(parameters(SHAPES), **arguments)
    assert isinstance(optimizer, adafactor.torch.Adafactor)
    assert optimizer.param_groups[0]["stochastic_rounding"]


def test_install_stays():
    before = _home().Adafactor
    try:
        install()
        assert _home().Adafactor is Adafactor
        with installed():
            pass
        assert _home().Adafactor is Adafactor
    finally:
        _home().Adafactor = before


def test_groups_in_their_words():
    a, b = parameters(SHAPES), parameters(SHAPES)
    groups = [[{"params": p[:1], "clip_threshold": 0.1}, {"params": p[1:], "decay_rate": -0.3}] for p in (a, b)]
    train(Adafactor(groups[0], **T5), 5)
    train(Theirs(groups[1], **T5), 5)
    for p, q in zip(a, b, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"lr": 1e-3}, r"^lr must be None with relative_step=True"),
        ({"relative_step": False}, r"^lr must be None with relative_step=True, and a number without, got None"),
        ({**T5, "warmup_init": True}, r"^warmup_init must be False without relative_step"),
        ({"weight_decay": 0.1}, r"^weight_decay must be 0 with scale_parameter or relative_step, got 0\.1\. transf"),
    ],
)
def test_what_cannot_mean_the_same_is_refused(arguments, text):
    with pytest.raises(ValueError, match=text):
        Adafactor(parameters(SHAPES), **arguments)


def test_a_release_that_has_moved_it(monkeypatch):
    """Another class is built than the one that was put in its place; or nothing of that name is anywhere."""
    before = _home().Adafactor
    monkeypatch.setattr(transformers.Trainer, "get_optimizer_cls_and_kwargs", lambda args: (Theirs, {}))
    with pytest.raises(RuntimeError, match=r"^transformers must be a release that looks its Adafactor up by name"):
        install()
    assert _home().Adafactor is before
    for name in ("transformers.trainer_optimizer", "transformers.trainer"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    with pytest.raises(RuntimeError, match=r"optimizer_cls_and_kwargs=\(adafactor\.transformers\.Adafactor"):
        install()
