"""Gradients that are not finite, or not when squared: one tensor sits the step out, bit for bit."""

import copy

import pytest
import torch
from torch_support import parameter, step

from adafactor.torch import Adafactor


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 1e30], ids=str)
@pytest.mark.parametrize("beta1", [None, 0.9])
def test_one_bad_gradient_among_fifty(bad, beta1):
    """1e30 is finite, but its square is not."""

    def params():
        generator = torch.Generator().manual_seed(2)
        return [torch.nn.Parameter(torch.randn((4, 3) if i % 2 else (5,), generator=generator)) for i in range(50)]

    def run(skip_nonfinite):
        ours = params()
        optimizer = Adafactor(ours, skip_nonfinite=skip_nonfinite, beta1=beta1, weight_decay=0.1)
        step(optimizer, 0)
        state = copy.deepcopy(optimizer.state_dict()["state"])
        before = [p.detach().clone() for p in ours]
        generator = torch.Generator().manual_seed(3)
        for i, p in enumerate(ours):
            p.grad = torch.randn(p.shape, generator=generator)
            if i == 17:
                p.grad.view(-1)[2] = bad
        optimizer.step()
        return ours, optimizer, before, state

    ours, optimizer, before, state = run(True)
    assert optimizer.skipped == 1
    moved = [not torch.equal(p, b) for p, b in zip(ours, before, strict=True)]
    assert moved == [i != 17 for i in range(50)]
    for name, value in optimizer.state[ours[17]].items():
        assert torch.equal(value, state[17][name])
    assert int(optimizer.state[ours[16]]["step"]) == 2
    step(optimizer, 5)
    assert int(optimizer.state[ours[17]]["step"]) == 2
    assert all(p.isfinite().all() for p in ours)

    ours, optimizer, before, _ = run(False)
    assert optimizer.skipped == 0
    assert int(optimizer.state[ours[17]]["step"]) == 2
    if bad != 1e30:
        assert not ours[17].isfinite().all()
    assert all(p.isfinite().all() for i, p in enumerate(ours) if i != 17)


def test_a_row_whose_sum_of_squares_overflows_is_left_alone():
    """No column sum overflows, nor the mean of them."""
    param = parameter(100, 3)
    optimizer = Adafactor([param])
    step(optimizer)
    param.grad = torch.zeros(100, 3)
    param.grad[5] = 1.5e19
    optimizer.step()
    assert optimizer.skipped == 1
    assert all(value.isfinite().all() for value in optimizer.state[param].values())


@pytest.mark.parametrize("fused", [None, False], ids=["native", "torch operations"])
def test_a_column_without_gradient_beside_a_huge_one(fused):
    """Its factor is about 1e31 there; with a step size of 1e14 beside it, it was inf, and 0 * inf is NaN."""
    param = torch.nn.Parameter(1e16 * torch.ones(2, 6))
    param.grad = torch.zeros(2, 6)
    param.grad[:, 2] = 1e16
    optimizer = Adafactor([param], fused=fused)
    optimizer.step()
    assert optimizer.skipped == 0
    torch.testing.assert_close(param.detach(), 1e16 * (1 - 0.01 * param.grad.sign()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("fused", [None, False], ids=["native", "torch operations"])
def test_clipping_sees_gradients_whose_squares_underflow(fused, dtype):
    """Alone in its row and its column, 1e-23 is a normalised update of 2.5e6 beside a gradient of 1."""
    param = torch.nn.Parameter(torch.ones(4, 4, dtype=dtype))
    param.grad = torch.zeros(4, 4, dtype=dtype)
    param.grad[0, 0], param.grad[3, 3] = 1.0, 1e-23
    Adafactor([param], lr=0.25, fused=fused).step()
    torch.testing.assert_close(param.detach().float(), 1 - torch.tensor([0.0, 0.0, 0.0, 1.0]).diag())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_bad_gradient_leaves_half_precision_bits_alone(dtype):
    param = parameter(64, 8, dtype=dtype)
    bits = param.detach().view(torch.int16).clone()
    optimizer = Adafactor([param], stochastic_rounding=True, weight_decay=0.5)
    param.grad = torch.full_like(param, float("nan"))
    optimizer.step()
    assert torch.equal(param.detach().view(torch.int16), bits)
    assert optimizer.skipped == 1


def test_float16_gradients_may_be_large():
    """Their squares overflow float16, not the float32 they are taken in."""
    param = parameter(8, 4, dtype=torch.float16)
    param.grad = torch.full((8, 4), 60000.0, dtype=torch.float16)
    optimizer = Adafactor([param], lr=0.1)
    optimizer.step()
    assert param.isfinite().all()
    assert optimizer.skipped == 0
