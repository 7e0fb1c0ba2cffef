"""One parameter at a time, from the gradient hooks of other trainers: the bits of step()."""

import pytest
import torch
from tied import Tied, assert_same, groups, loss_of

from adafactor.torch import Adafactor

MODES = [{}, {"stochastic_rounding": True, "seed": 0}, {"compensated": True}]


def by_group(optimizer):
    """sd-scripts' and musubi-tuner's way: the parameter and its group."""
    for group in optimizer.param_groups:
        for param in group["params"]:

            def hook(tensor, group=group):
                optimizer.step_param(tensor, group)
                tensor.grad = None

            if param.requires_grad:
                param.register_post_accumulate_grad_hook(hook)


def by_position(optimizer):
    """OneTrainer's way: the parameter, its group, and its position there."""
    assert optimizer.supports_fused_back_pass
    for group in optimizer.param_groups:
        for i, param in enumerate(group["params"]):

            def hook(tensor, group=group, i=i):
                torch.nn.utils.clip_grad_norm_(tensor, 1e6)
                optimizer.step_parameter(tensor, group, i)
                tensor.grad = None

            if param.requires_grad:
                param.register_post_accumulate_grad_hook(hook)


@pytest.mark.parametrize("attach", [by_group, by_position])
@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("fused", [None, False], ids=["native", "aten"])
def test_the_same_bits_as_step(attach, mode, fused):
    runs = []
    for hooked in (False, True):
        model = Tied().bfloat16()
        optimizer = Adafactor(groups(model), lr=1e-2, fused=fused, **mode)
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.7)
        if hooked:
            attach(optimizer)
        for t in range(4):
            loss_of(model, t).backward()
            if not hooked:
                optimizer.step()
                optimizer.zero_grad()
            assert all(p.grad is None for p in model.parameters())
            schedule.step()
            if t == 1:
                optimizer.load_state_dict(optimizer.state_dict())  # the hooks hold groups that are no more
        runs += [optimizer, model]
    assert_same(*runs)


def test_nothing_is_prepared_twice():
    """A parameter at a time is a list each, and all are remembered."""
    model = torch.nn.Sequential(*[torch.nn.Linear(3, 3) for _ in range(20)])
    optimizer = Adafactor(model.parameters())
    by_group(optimizer)
    model(torch.ones(1, 3)).sum().backward()
    before = dict(optimizer._preparation._prepared)
    model(torch.ones(1, 3)).sum().backward()
    assert len(before) == 40
    assert all(optimizer._preparation._prepared[key] is made for key, made in before.items())


def test_lists_that_always_differ_do_not_fill_the_memory():
    params = [torch.nn.Parameter(torch.ones(2)) for _ in range(6)]
    optimizer = Adafactor(params)
    for number in range(1, 64):
        for k, param in enumerate(params):
            param.grad = torch.ones(2) if number >> k & 1 else None
        optimizer.step()
        assert sum(map(len, optimizer._preparation._prepared)) <= 8 * 6


def test_groups_that_have_changed():
    a, b = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(2))
    optimizer = Adafactor([a])
    with pytest.raises(ValueError, match=r"^p must be a parameter of this optimizer, got 'one of shape \(2,\)'"):
        optimizer.step_param(b, optimizer.param_groups[0])
    optimizer.add_param_group({"params": [b]})
    b.grad = torch.ones(2)
    optimizer.step_param(b, optimizer.param_groups[0])
    optimizer.step_param(a, optimizer.param_groups[0])  # without a gradient: nothing
    assert b in optimizer.state
    assert a not in optimizer.state
