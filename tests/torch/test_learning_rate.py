"""Whatever moves the learning rate or the scale of the loss: schedulers, tensors, GradScaler."""

import copy

import pytest
import torch
from torch.optim import lr_scheduler
from torch_support import model, parameter, step

from adafactor.torch import Adafactor


def schedulers():
    yield lambda o: lr_scheduler.LambdaLR(o, lambda t: 0.9**t)
    yield lambda o: lr_scheduler.MultiplicativeLR(o, lambda t: 0.9)
    yield lambda o: lr_scheduler.StepLR(o, 2)
    yield lambda o: lr_scheduler.MultiStepLR(o, [1, 3])
    yield lambda o: lr_scheduler.ConstantLR(o)
    yield lambda o: lr_scheduler.LinearLR(o)
    yield lambda o: lr_scheduler.ExponentialLR(o, 0.9)
    yield lambda o: lr_scheduler.CosineAnnealingLR(o, 5)
    yield lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3)
    yield lambda o: lr_scheduler.PolynomialLR(o, 5)
    yield lambda o: lr_scheduler.CyclicLR(o, 1e-3, 1e-2, cycle_momentum=False)
    yield lambda o: lr_scheduler.OneCycleLR(o, 1e-2, total_steps=9, cycle_momentum=False)
    yield lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0)
    yield lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o), lr_scheduler.ExponentialLR(o, 0.9)], milestones=[2]
    )
    yield lambda o: lr_scheduler.ChainedScheduler([lr_scheduler.LinearLR(o), lr_scheduler.ExponentialLR(o, 0.9)])
    yield lambda o: torch.optim.swa_utils.SWALR(o, swa_lr=1e-3)


@pytest.mark.parametrize("as_tensor", [False, True], ids=["float", "tensor"])
@pytest.mark.parametrize("scheduler", list(schedulers()))
def test_every_scheduler(scheduler, as_tensor):
    """With no cap and no parameter scale the first row of steps is lr times a fixed direction."""
    param = torch.nn.Parameter(torch.zeros(2, 2, dtype=torch.float64))
    lr = torch.tensor(1e-2, dtype=torch.float64) if as_tensor else 1e-2
    optimizer = Adafactor([param], lr=lr, relative_step=False, scale_parameter=False)
    schedule = scheduler(optimizer)
    for _ in range(5):
        before = param.detach().clone()
        rate = float(optimizer.param_groups[0]["lr"])
        param.grad = torch.ones_like(param)
        optimizer.step()
        torch.testing.assert_close(before - param.detach(), torch.full_like(before, rate))
        schedule.step(*([1.0] if isinstance(schedule, lr_scheduler.ReduceLROnPlateau) else []))


@pytest.mark.parametrize("shape", [(), (1,)], ids=str)
@pytest.mark.parametrize("relative_step", [True, False])
def test_lr_may_be_a_tensor(shape, relative_step):
    a, b = parameter(4, 3), parameter(4, 3)
    with torch.no_grad():
        b.copy_(a)
    rate = torch.full(shape, 0.9)
    with_tensor = Adafactor([a], lr=rate, relative_step=relative_step, weight_decay=0.1)
    with_number = Adafactor([b], lr=0.9, relative_step=relative_step, weight_decay=0.1)
    for t in range(3):
        step(with_tensor, t)
        step(with_number, t)
    # float32 holds 0.9 to 3e-8, and three steps move a weight near zero by about 1.
    torch.testing.assert_close(a, b, rtol=1e-6, atol=3e-7)
    assert rate.item() == pytest.approx(0.9)


def test_grad_scaler_on_the_cpu():
    net = model()
    optimizer = Adafactor(net.parameters())
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    twin = copy.deepcopy(net)
    plain = Adafactor(twin.parameters())
    x = torch.randn(5, 4)
    for t in range(4):
        optimizer.zero_grad()
        plain.zero_grad()
        scaler.scale(net(x).square().mean() * (float("inf") if t == 2 else 1.0)).backward()
        scaler.step(optimizer)
        scaler.update()
        if t != 2:
            twin(x).square().mean().backward()
            plain.step()
    assert scaler.get_scale() == 2.0**9
    assert optimizer.skipped == 0  # the scaler left the whole step out
    for a, b in zip(net.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def test_grad_scaler_with_unscale_and_clipping():
    net = model()
    optimizer = Adafactor(net.parameters())
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    scaler.scale(net(torch.ones(5, 4)).square().mean()).backward()
    scaler.unscale_(optimizer)
    torch.nn.utils.clip_grad_norm_(net.parameters(), 0.1)
    scaler.step(optimizer)
    scaler.update()
    assert all(int(optimizer.state[p]["step"]) == 1 for p in net.parameters())
