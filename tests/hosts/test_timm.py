"""timm's factory, and pytorch_optimizer's: where they are installed, and torchvision fits this build of torch."""

import pytest
import torch

from adafactor.torch import Adafactor

try:
    from timm.optim import create_optimizer_v2
    from timm.optim._optim_factory import default_registry

    from adafactor.timm import register
except (ImportError, RuntimeError) as error:  # the latter from torchvision
    pytest.skip(f"timm: {error}", allow_module_level=True)


@pytest.fixture(autouse=True)
def _as_before():
    before = dict(default_registry._optimizers)
    yield
    default_registry._optimizers.clear()
    default_registry._optimizers.update(before)


def model():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.Flatten(), torch.nn.Linear(32, 2))


@pytest.mark.parametrize("options", [{}, {"layer_decay": 0.7}, {"momentum": 0.9, "eps": 1e-8, "betas": (0.9, 0.99)}])
def test_the_factory_builds_ours(options, caplog):
    register(stochastic_rounding=True)
    assert "overwriting" not in caplog.text
    net = model()
    optimizer = create_optimizer_v2(net, "adafactor", lr=1e-2, weight_decay=0.05, **options)
    assert type(optimizer) is Adafactor
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.0, 0.05}
    assert all(group["stochastic_rounding"] and not group["relative_step"] for group in optimizer.param_groups)
    net(torch.randn(4, 3, 4, 4)).square().mean().backward()
    optimizer.step()
    assert optimizer.state[net[0].weight]["row"].numel() + optimizer.state[net[0].weight]["column"].numel() == 24 + 9


def test_under_another_name():
    register("ours", scale_parameter=True)
    assert type(create_optimizer_v2(model(), "lookahead_ours", lr=1e-2)._base_optimizer) is Adafactor
    assert type(create_optimizer_v2(model(), "adafactor", lr=1e-2)) is not Adafactor
