"""Against `torch.optim.Adafactor`: equal hyperparameters, equal numbers, and its checkpoints go on here."""

import copy

import pytest
import torch
from tolerances import TOLERANCES

from adafactor.torch import Adafactor

SHAPES = [(6, 4), (2, 3, 5), (3, 2, 4, 4), (7,)]
OPTIONS = {
    "default": {},
    "learning rate": {"lr": 1.0},
    "weight decay": {"weight_decay": 0.1, "lr": 0.05},
    "clipping": {"d": 2.0},
    "decay": {"beta2_decay": -0.5},
    "maximize": {"maximize": True},
}


def parameters(dtype):
    generator = torch.Generator().manual_seed(1)
    return [torch.nn.Parameter(torch.randn(s, generator=generator, dtype=dtype)) for s in SHAPES]


def train(optimizer, steps, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for group in optimizer.param_groups:
            for param in group["params"]:
                param.grad = torch.randn(param.shape, generator=generator, dtype=param.dtype)
        optimizer.step()


def largest_difference(ours, theirs):
    return max(((a - b).abs().max() / b.abs().max()).item() for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_same_numbers(options, dtype, foreach):
    ours, theirs = parameters(dtype), parameters(dtype)
    train(Adafactor(ours, eps=(1e-30, 1e-3), **options), 20)
    train(torch.optim.Adafactor(theirs, eps=(1e-30, 1e-3), foreach=foreach, **options), 20)
    # Their step counter, and so beta2(t), is a float32 taken to a Python float: equal for both dtypes.
    assert largest_difference(ours, theirs) < TOLERANCES["torch.optim"][str(dtype).removeprefix("torch.")]


def test_same_numbers_in_groups():
    def groups(params):
        return [{"params": params[:2], "lr": 0.1}, {"params": params[2:], "weight_decay": 0.2, "eps": (1e-30, 1e-2)}]

    ours, theirs = parameters(torch.float32), parameters(torch.float32)
    train(Adafactor(groups(ours)), 10)
    train(torch.optim.Adafactor(groups(theirs), eps=(1e-30, 1e-3)), 10)
    assert largest_difference(ours, theirs) < 1e-6


def test_no_epsilon_of_theirs_where_it_means_none():
    """eps[0]=None is 1e-30 here; theirs is the parameter dtype's epsilon, a floor that bfloat16 never leaves."""
    ours = torch.nn.Parameter(torch.randn(32, 16).bfloat16())
    theirs = torch.nn.Parameter(ours.detach().clone())
    scale = torch.logspace(-1, 1, 32)[:, None]  # rows a hundred times apart
    gradient = (1e-3 * scale * torch.randn(32, 16)).bfloat16()
    displacement = {}
    for name, param, optimizer in (
        ("ours", ours, Adafactor([ours], lr=1.0, eps=(None, 1e-3))),
        ("theirs", theirs, torch.optim.Adafactor([theirs], lr=1.0, eps=(None, 1e-3))),
    ):
        start = param.detach().clone()
        param.grad = gradient.clone()
        optimizer.step()
        displacement[name] = (param.detach() - start).float().square().mean(1).sqrt()
    assert displacement["ours"].max() / displacement["ours"].min() < 2  # normalised: every row moves alike
    assert displacement["theirs"].max() / displacement["theirs"].min() > 20  # plain gradient descent


@pytest.mark.parametrize("through_a_file", [False, True])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_their_checkpoint_goes_on_here(options, through_a_file, tmp_path):
    theirs = parameters(torch.float32)
    # eps[0]=None is their default, and with gradients near 1 their floor is never reached.
    optimizer = torch.optim.Adafactor(theirs, **options)
    train(optimizer, 10)
    saved = optimizer.state_dict()
    if through_a_file:
        torch.save(saved, tmp_path / "optimizer.pt")
        saved = torch.load(tmp_path / "optimizer.pt")
    ours = [torch.nn.Parameter(p.detach().clone()) for p in theirs]
    resumed = Adafactor(ours, lr=0.7, relative_step=False, scale_parameter=False)
    before = copy.deepcopy(saved)
    resumed.load_state_dict(saved)
    train(optimizer, 20, seed=1)
    train(resumed, 20, seed=1)
    assert largest_difference(ours, theirs) < 1e-5
    for key, values in before["state"].items():  # reading changes nothing
        assert values.keys() == saved["state"][key].keys()


def test_their_bfloat16_statistics_become_float32():
    param = torch.nn.Parameter(torch.randn(6, 4).bfloat16())
    theirs = torch.optim.Adafactor([param])
    train(theirs, 3)
    resumed = Adafactor([param])
    resumed.load_state_dict(theirs.state_dict())
    assert {value.dtype for value in resumed.state[param].values()} == {torch.float32, torch.int64}
    assert int(resumed.state[param]["step"]) == 3


def test_an_epsilon_that_means_something_else_is_named():
    param = torch.nn.Parameter(torch.randn(6, 4))
    theirs = torch.optim.Adafactor([param], eps=(1e-3, 1e-3))
    train(theirs, 1)
    with pytest.warns(UserWarning, match=r"eps\[0\]=0.001 as a floor"):
        Adafactor([param]).load_state_dict(theirs.state_dict())
