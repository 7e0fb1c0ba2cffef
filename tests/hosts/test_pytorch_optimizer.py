"""The loader of pytorch_optimizer, which other trainers fall back to, passes what this class takes."""

import pytest
import torch

from adafactor.torch import Adafactor

theirs = pytest.importorskip("pytorch_optimizer")


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_what_it_passes(weight_decay, monkeypatch):
    monkeypatch.setattr(theirs.optimizer, "load_optimizer", lambda name: Adafactor)
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.LayerNorm(3))
    optimizer = theirs.create_optimizer(model, "adafactor", lr=1e-3, weight_decay=weight_decay, use_lookahead=True)
    model(torch.ones(2, 4)).square().sum().backward()
    optimizer.step()
    assert type(optimizer.optimizer) is Adafactor
    assert {group["weight_decay"] for group in optimizer.optimizer.param_groups} == {0.0, weight_decay}
