"""The learning-rate test: it proposes, or says why not, and leaves no trace."""

import copy
import random

import numpy as np
import pytest
import torch
from torch import nn

from adafactor.torch import Adafactor, lr_range_test, step_in_backward


def made(**options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 32), nn.BatchNorm1d(32), nn.Dropout(0.1), nn.ReLU(), nn.Linear(32, 4))
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices}, {"params": vectors, "lr": torch.tensor(5e-3)}]
    return model, Adafactor(groups, lr=1e-2, relative_step=False, **options)


def batches(noise=0.0):
    teacher = torch.randn(8, 4, generator=torch.Generator().manual_seed(1))
    while True:
        x = torch.randn(32, 8)
        labels = torch.randint(4, (32,))
        yield x, labels if noise else (x @ teacher).argmax(1)


def loss_of(model, batch):
    random.random()
    np.random.random()  # noqa: NPY002 - the numbers that everybody shares
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def everything(model, optimizer):
    """All that a run could have left a trace in."""
    state = [{slot: x.clone() for slot, x in optimizer.state.get(p, {}).items()} for p in model.parameters()]
    groups = [{k: copy.deepcopy(v) for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
    grads = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    diagnostics = optimizer.diagnostics() if optimizer._diagnostics is not None else {}
    generators = (torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy())  # noqa: NPY002
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    return weights, state, groups, grads, diagnostics, optimizer.skipped, generators, model.training


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, np.ndarray):
        return np.array_equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


@pytest.mark.parametrize("trained", [0, 3])
@pytest.mark.parametrize("ends", ["well", "interrupted", "in an error"])
@pytest.mark.parametrize("options", [{}, {"beta1": 0.9, "diagnostics": True}], ids=str)
def test_everything_is_as_before(trained, ends, options):
    model, optimizer = made(**options)
    source = batches()
    for _ in range(trained):
        optimizer.zero_grad()
        loss_of(model, next(source)).backward()
        optimizer.step()
    model.eval()
    before = everything(model, optimizer)
    calls = []

    def loss(model, batch):
        model.train()
        calls.append(1)
        if len(calls) == 60 and ends != "well":
            raise KeyboardInterrupt if ends == "interrupted" else ZeroDivisionError
        return loss_of(model, batch)

    data = batches()
    if ends == "well":
        lr_range_test(model, optimizer, data, loss, steps=5)
        assert len(calls) > 100
    else:
        with pytest.raises(KeyboardInterrupt if ends == "interrupted" else ZeroDivisionError):
            lr_range_test(model, optimizer, data, loss, steps=5)
    assert same(everything(model, optimizer), before)
    other, its = made(**options)
    other.load_state_dict(model.state_dict())
    its.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        p.grad = torch.ones_like(p)
        q.grad = torch.ones_like(q)
    optimizer.step()  # and training goes on from there
    its.step()
    assert same(list(model.state_dict().values()), list(other.state_dict().values()))


def test_it_proposes_and_draws():
    model, optimizer = made()
    found = lr_range_test(model, optimizer, batches(), loss_of, steps=15)
    assert 1e-2 < found.lr < 1
    best = found.losses[found.lrs.index(found.lr)]
    assert best == min(found.losses) < found.before - found.noise
    lines = str(found).splitlines()
    assert len(lines) == 2 + len(found.lrs)
    assert [line.endswith("<") for line in lines[1:-1]].index(True) == found.lrs.index(found.lr)
    assert "lowers the loss" in lines[-1]


@pytest.mark.parametrize(
    ("options", "noise", "text"),
    [
        ({"lrs": (1e-9, 1e-8, 1e-7)}, 0.0, "by more than chance"),
        ({"lrs": (1e-6, 1e-5, 1e-4)}, 1.0, "by more than chance"),
        ({"lrs": (1e-3, 3e-3, 1e-2)}, 0.0, "towards the last learning rate: go beyond it"),
        ({"lrs": (0.1, 1.0, 10.0)}, 0.0, "towards the first learning rate: go beyond it"),
        ({"lrs": (1e28, 1e30, 1e32)}, 0.0, "kept the loss finite"),
    ],
)
def test_it_says_when_the_losses_support_no_proposal(options, noise, text):
    model, optimizer = made(**({"scale_parameter": False} if options["lrs"][0] > 1 else {}))
    found = lr_range_test(model, optimizer, batches(noise), loss_of, steps=10, **options)
    assert found.lr is None
    assert text in found.reason
    assert str(found)


def test_refusals():
    model, optimizer = made()
    with pytest.raises(ValueError, match=r"^lrs must be three or more rising numbers > 0"):
        lr_range_test(model, optimizer, batches(), loss_of, lrs=(1.0, 0.1, 0.01))
    with pytest.raises(ValueError, match=r"^batches must be at least 9, got 3"):
        lr_range_test(model, optimizer, [next(batches())] * 3, loss_of)
    with pytest.raises(TypeError, match=r"^optimizer must be an adafactor\.torch\.Adafactor, got 'SGD'"):
        lr_range_test(model, torch.optim.SGD(model.parameters()), batches(), loss_of)
    with step_in_backward(model, optimizer), pytest.raises(RuntimeError, match="Call it before step_in_backward"):
        lr_range_test(model, optimizer, batches(), loss_of)
    optimizer.param_groups[0]["lr"] = optimizer.param_groups[1]["lr"] = 0.0
    with pytest.raises(ValueError, match=r"^lr of the optimizer must be > 0, got 0\.0"):
        lr_range_test(model, optimizer, batches(), loss_of)
