"""The learning rate in sight: what the next update will multiply by, and what the last one did."""

import pytest
import torch
from native_support import need

from adafactor.core import native
from adafactor.core.factoring import Factored
from adafactor.torch import Adafactor


@pytest.fixture(params=["native", "aten"])
def fused(request):
    if request.param == "native":
        need(native.why_not())
    return request.param == "native"


def rule(name, shape):
    return Factored(rows=(1,), columns=(2,), batch=(0,)) if name == "stack" else None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", [{}, {"relative_step": False}, {"scale_parameter": False}], ids=str)
@pytest.mark.parametrize("tensor", [False, True])
def test_what_the_next_update_multiplies_by_the_last_one_did(fused, dtype, options, tensor):
    torch.manual_seed(0)
    shapes = {"matrix": (6, 5), "vector": (7,), "stack": (3, 4, 5), "small": (3,)}
    named = [(name, torch.nn.Parameter((torch.randn(s) / 10).to(dtype))) for name, s in shapes.items()]
    named[-1][1].data.mul_(1e-4)  # below eps[1]
    lr = torch.tensor(0.2) if tensor else 0.2
    optimizer = Adafactor(named, lr=lr, factoring=rule, diagnostics=True, fused=fused, weight_decay=0.1, **options)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 3.0 if t == 2 else 1.0)
    for t in range(1, 5):
        expected = optimizer.effective_lr()
        lr = 0.6 if t == 3 else 0.2
        rho = min(lr, t**-0.5) if options.get("relative_step", True) else lr
        for name, param in named:
            axes = (1, 2) if name == "stack" else tuple(range(param.dim()))
            scale = param.detach().double().square().mean(axes).sqrt().clamp(min=1e-3)
            wanted = scale * rho if options.get("scale_parameter", True) else torch.full_like(scale, rho)
            if name == "stack" and not options.get("scale_parameter", True):
                wanted = wanted[0]
            torch.testing.assert_close(expected[name].double(), wanted, rtol=1e-5, atol=0)
            param.grad = torch.randn_like(param)
        optimizer.step()
        schedule.step()  # the last update's learning rate is what counts
        found = optimizer.diagnostics()
        for name in shapes:
            alpha = found[name]["effective_lr"]
            torch.testing.assert_close(alpha, expected[name].to(alpha).expand_as(alpha), rtol=1e-5, atol=0)


def test_without_names_and_before_the_first_update():
    params = [torch.nn.Parameter(torch.ones(2, 3)), torch.nn.Parameter(torch.full((4,), 2.0))]
    optimizer = Adafactor([{"params": params[:1]}, {"params": params[1:], "lr": 3.0}], lr=0.5)
    assert {name: float(value) for name, value in optimizer.effective_lr().items()} == {"0": 0.5, "1": 2.0}


def test_no_wait_for_the_device():
    """On a device without values nothing can be waited for."""
    params = [torch.nn.Parameter(torch.ones(2, 3, device="meta"))]
    assert Adafactor(params, fused=False).effective_lr()["0"].is_meta
