"""Our own checkpoints: bit for bit, float32 statistics, no aliases, nothing half loaded."""

import copy

import pytest
import torch
from torch_support import parameters, train

from adafactor import Factored
from adafactor.torch import Adafactor

SHAPES = [(6, 4), (2, 3, 5), (7,), ()]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("momentum_dtype", [None, torch.bfloat16], ids=str)
def test_resume_bit_for_bit(dtype, momentum_dtype, tmp_path):
    options = {"beta1": 0.9, "stochastic_rounding": True, "weight_decay": 0.1, "momentum_dtype": momentum_dtype}
    ours = parameters(SHAPES, dtype)
    optimizer = Adafactor(ours, seed=7, **options)
    train(optimizer, 5)
    torch.save({"params": [p.detach() for p in ours], "optimizer": optimizer.state_dict()}, tmp_path / "checkpoint.pt")
    train(optimizer, 5, seed=1)

    saved = torch.load(tmp_path / "checkpoint.pt")  # weights_only=True: nothing but tensors and plain values
    again = [torch.nn.Parameter(p) for p in saved["params"]]
    resumed = Adafactor(again)  # every hyperparameter comes from the file
    resumed.load_state_dict(saved["optimizer"])
    train(resumed, 5, seed=1)
    for a, b in zip(ours, again, strict=True):
        assert torch.equal(a, b)
        for name, value in optimizer.state[a].items():
            assert resumed.state[b][name].dtype == value.dtype
            assert torch.equal(resumed.state[b][name], value)


def test_statistics_of_a_bfloat16_model_stay_float32():
    ours = parameters(SHAPES, torch.bfloat16)
    optimizer = Adafactor(ours)
    train(optimizer, 3)
    resumed = Adafactor(ours)
    resumed.load_state_dict(optimizer.state_dict())
    assert {v.dtype for s in resumed.state.values() for v in s.values()} == {torch.float32, torch.int64}


def test_loading_copies():
    ours = parameters(SHAPES)
    optimizer = Adafactor(ours)
    train(optimizer, 2)
    saved = optimizer.state_dict()
    twin = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    resumed = Adafactor(twin)
    resumed.load_state_dict(saved)
    before = copy.deepcopy(saved["state"])
    train(resumed, 2)
    for key, values in before.items():
        for name, value in values.items():
            assert torch.equal(saved["state"][key][name], value)


def test_hooks_around_loading():
    ours = parameters(SHAPES)
    optimizer = Adafactor(ours)
    train(optimizer, 2)
    saved = optimizer.state_dict()
    wrapped = {"inside": saved}
    resumed = Adafactor(ours)
    seen = []
    resumed.register_load_state_dict_pre_hook(lambda o, state_dict: state_dict["inside"])
    resumed.register_load_state_dict_post_hook(lambda o: seen.append(int(o.state[ours[0]]["step"])))
    resumed.load_state_dict(wrapped)
    assert seen == [2]


def test_groups_that_do_not_match():
    optimizer = Adafactor(parameters(SHAPES))
    train(optimizer, 1)
    with pytest.raises(ValueError, match="size of optimizer's group"):
        Adafactor(parameters(SHAPES)[:2]).load_state_dict(optimizer.state_dict())


def test_a_layout_that_does_not_match_is_refused_whole():
    whole = Adafactor(parameters(SHAPES), factoring=lambda name, shape: None)
    train(whole, 1)
    other = Adafactor(parameters(SHAPES))
    train(other, 2)
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(ValueError, match=r"parameter 0 of shape \(6, 4\) needs the statistics row \(6,\) and column"):
        other.load_state_dict(whole.state_dict())
    assert str(other.state_dict()) == str(before)


def test_a_callable_rule_stays_out_of_the_file(tmp_path):
    def rule(name, shape):
        return Factored(rows=(1,), columns=(0,)) if len(shape) == 2 else None

    ours = parameters(SHAPES)
    optimizer = Adafactor(ours, factoring=rule)
    train(optimizer, 2)
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    resumed = Adafactor(ours, factoring=rule)
    resumed.load_state_dict(torch.load(tmp_path / "optimizer.pt"))
    assert resumed.param_groups[0]["factoring"] is rule
    assert torch.equal(resumed.state[ours[0]]["row"], optimizer.state[ours[0]]["row"])
