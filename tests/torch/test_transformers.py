"""Against `transformers.optimization.Adafactor`: its recipes, and its checkpoints go on here."""

import pytest
import torch
from tolerances import TOLERANCES
from torch_support import parameters, train
from transformers.optimization import Adafactor as Theirs

from adafactor.torch import Adafactor

TOLERANCE = TOLERANCES["transformers"]

SHAPES = [(6, 4), (2, 3, 5), (7,)]
T5 = {"relative_step": False, "scale_parameter": False, "lr": 1e-3}
# transformers' arguments, and ours for the same run.
RECIPES = {
    "default": ({}, {}),
    "T5": (T5, T5),
    "T5, clipping": ({**T5, "clip_threshold": 0.5}, {**T5, "d": 0.5}),
    "T5, decay": ({**T5, "decay_rate": -0.5}, {**T5, "beta2_decay": -0.5}),
    "T5, weight decay": ({**T5, "weight_decay": 0.1}, {**T5, "weight_decay": 0.1}),
    "T5, momentum": ({**T5, "beta1": 0.9}, {**T5, "beta1": 0.9}),
    "scaled, not capped": (
        {"relative_step": False, "scale_parameter": True, "lr": 1e-2},
        {"relative_step": False, "lr": 1e-2},
    ),
    "capped, not scaled": ({"scale_parameter": False}, {"scale_parameter": False}),
    "epsilons": ({"eps": (1e-4, 1e-1)}, {"eps": (1e-4, 1e-1)}),
}


def largest_difference(ours, theirs):
    return max(((a - b).abs().max() / b.abs().max()).item() for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize(("theirs", "ours"), RECIPES.values(), ids=RECIPES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_same_numbers(theirs, ours, dtype):
    a, b = parameters(SHAPES, dtype), parameters(SHAPES, dtype)
    train(Adafactor(a, **ours), 20)
    train(Theirs(b, **theirs), 20)
    assert largest_difference(a, b) < TOLERANCE[str(dtype).removeprefix("torch.")]


def test_same_numbers_in_bfloat16():
    a, b = parameters(SHAPES, torch.bfloat16), parameters(SHAPES, torch.bfloat16)
    train(Adafactor(a, **T5), 20)
    train(Theirs(b, **T5), 20)
    assert largest_difference(a, b) <= TOLERANCE["bfloat16"]


def test_warmup_init_is_a_scheduler_of_two_lines():
    a, b = parameters(SHAPES), parameters(SHAPES)
    ours = Adafactor(a, lr=1e-2)
    warmup = torch.optim.lr_scheduler.LambdaLR(ours, lambda t: min(1.0, 1e-4 * (t + 1)))
    theirs = Theirs(b, warmup_init=True)
    for t in range(10):
        train(ours, 1, seed=t)
        warmup.step()
        train(theirs, 1, seed=t)
    assert largest_difference(a, b) < TOLERANCE["float32"]


@pytest.mark.parametrize("through_a_file", [False, True])
@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_their_checkpoint_goes_on_here(recipe, through_a_file, tmp_path):
    b = parameters(SHAPES)
    theirs = Theirs(b, **recipe[0])
    train(theirs, 10)
    saved = theirs.state_dict()
    if through_a_file:
        torch.save(saved, tmp_path / "optimizer.pt")
        saved = torch.load(tmp_path / "optimizer.pt")
    a = [torch.nn.Parameter(p.detach().clone()) for p in b]
    ours = Adafactor(a)
    ours.load_state_dict(saved)
    train(theirs, 20, seed=1)
    train(ours, 20, seed=1)
    assert largest_difference(a, b) < 1e-5


def test_momentum_carries_over_approximately_when_their_step_size_varied():
    b = parameters(SHAPES)
    theirs = Theirs(b, beta1=0.9)
    train(theirs, 10)
    a = [torch.nn.Parameter(p.detach().clone()) for p in b]
    ours = Adafactor(a)
    with pytest.warns(UserWarning, match="divided by the last one, it carries over approximately"):
        ours.load_state_dict(theirs.state_dict())
    start = [p.detach().clone() for p in b]
    train(theirs, 1, seed=1)
    train(ours, 1, seed=1)
    for p, q, s in zip(a, b, start, strict=True):
        assert ((p - q).norm() / (q - s).norm()).item() < 0.01


@pytest.mark.parametrize(
    ("recipe", "text"),
    [
        ({"warmup_init": True}, "warmup_init does not carry over"),
        ({"weight_decay": 0.1}, "choose weight_decay anew"),
    ],
)
def test_what_cannot_carry_over_is_named(recipe, text):
    theirs = Theirs(parameters(SHAPES), **recipe)
    train(theirs, 1)
    with pytest.warns(UserWarning, match=text):
        Adafactor(parameters(SHAPES)).load_state_dict(theirs.state_dict())
