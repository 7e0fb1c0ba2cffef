"""``optimizer.diagnostics()``: RMS(u), the clip factor, the parameter scale and the skipped steps of every tensor."""

import copy
import math

import pytest
import torch
from native_support import need

from adafactor.core import native
from adafactor.core.factoring import Factored
from adafactor.torch import Adafactor

SHAPES = {"matrix": (13, 14), "vector": (15,), "stack": (3, 13, 12)}


@pytest.fixture(params=["native", "aten"])
def fused(request):
    if request.param == "native":
        need(native.why_not())
    return request.param == "native"


def factoring(name, shape):
    if len(shape) < 2:
        return None
    return Factored(rows=(len(shape) - 2,), columns=(len(shape) - 1,), batch=tuple(range(len(shape) - 2)))


def made(**options):
    torch.manual_seed(0)
    named = [(name, torch.nn.Parameter(torch.randn(shape))) for name, shape in SHAPES.items()]
    return named, Adafactor(named, lr=1e-2, factoring=factoring, diagnostics=True, **options)


def give(named, power=3):
    for _, param in named:
        param.grad = torch.randn_like(param) ** power


@pytest.mark.parametrize("d", [0.5, None], ids=str)
@pytest.mark.parametrize("scale", [True, False])
def test_values(fused, d, scale):
    """What the parameters' own displacement says of each number."""
    named, optimizer = made(fused=fused, d=d, scale_parameter=scale, relative_step=False)
    for _ in range(3):
        give(named)
        before = {name: param.detach().double().clone() for name, param in named}
        optimizer.step()
    found = optimizer.diagnostics()
    assert list(found) == list(SHAPES)
    for name, param in named:
        values = found[name]
        shape = (3,) if name == "stack" else ()
        assert all(value.shape == shape for value in values.values())
        axes = (1, 2) if name == "stack" else tuple(range(param.dim()))
        rms = lambda x, axes=axes: x.square().mean(axes).sqrt()  # noqa: E731
        wanted = rms(before[name]).clamp(min=1e-3) if scale else torch.ones(shape, dtype=torch.float64)
        torch.testing.assert_close(values["parameter_scale"], wanted, rtol=1e-5, atol=0)
        factor = (values["update_rms"] / d).clamp(min=1) if d else torch.ones(shape, dtype=torch.float64)
        torch.testing.assert_close(values["clip_factor"], factor, rtol=1e-5, atol=0)
        moved = rms(before[name] - param.detach().double()) / (1e-2 * wanted)
        torch.testing.assert_close(values["update_rms"] / values["clip_factor"], moved, rtol=1e-3, atol=0)
        assert (values["skipped"] == 0).all()


def test_a_skipped_step_is_counted_and_keeps_the_last_values(fused):
    named, optimizer = made(fused=fused)
    give(named)
    optimizer.step()
    before = optimizer.diagnostics()
    for _ in range(2):
        give(named)
        named[0][1].grad[3, 4] = math.nan
        optimizer.step()
    after = optimizer.diagnostics()
    assert {name: int(values["skipped"].max()) for name, values in after.items()} == {
        "matrix": 2,
        "vector": 0,
        "stack": 0,
    }
    assert optimizer.skipped == 2
    for key in ("update_rms", "clip_factor", "parameter_scale"):
        assert after["matrix"][key] == before["matrix"][key]
        assert after["vector"][key] != before["vector"][key] or key == "clip_factor"


def test_both_kernels_agree():
    need(native.why_not())
    results = []
    for fused in (True, False):
        named, optimizer = made(fused=fused, weight_decay=0.1)
        for _ in range(3):
            give(named)
            optimizer.step()
        results.append(optimizer.diagnostics())
    torch.testing.assert_close(*results, rtol=1e-5, atol=0)


def test_recording_changes_nothing_else(fused):
    results = []
    for diagnostics in (True, False):
        named, optimizer = made(fused=fused)
        if not diagnostics:
            optimizer = Adafactor(named, lr=1e-2, factoring=factoring, fused=fused)
        for _ in range(3):
            give(named)
            optimizer.step()
        results.append([param.detach() for _, param in named])
        assert ("diagnostics" in optimizer.state_dict()["param_groups"][0]) is False
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)
    with pytest.raises(RuntimeError, match="diagnostics must be True to have any, got False"):
        optimizer.diagnostics()


def test_unnamed_and_copied():
    param = torch.nn.Parameter(torch.randn(4, 5))
    optimizer = Adafactor([param], diagnostics=True)
    assert optimizer.diagnostics() == {}
    param.grad = torch.randn(4, 5)
    optimizer.step()
    assert optimizer.diagnostics()["0"]["update_rms"] > 0
    again = copy.deepcopy(optimizer)
    assert again.diagnostics() == {}
    optimizer.load_state_dict(optimizer.state_dict())
    param.grad = torch.randn(4, 5)
    optimizer.step()
    assert optimizer.diagnostics()["0"]["clip_factor"] >= 1


def test_an_argument_that_is_no_flag_is_refused():
    with pytest.raises(TypeError, match="diagnostics must be True or False"):
        Adafactor([torch.nn.Parameter(torch.zeros(2, 2))], diagnostics="yes")
