"""Compensated bfloat16 and float16: what rounding cuts off is kept and added again."""

import copy
import pickle

import pytest
import torch
from torch_support import parameters, step, train

from adafactor.engine.torch import blocks
from adafactor.torch import Adafactor

HALF = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
KERNELS = pytest.mark.parametrize("fused", [None, False], ids=["native", "aten"])
SHAPES = [(6, 4), (2, 3, 5), (7,), (), (300, 1100)]
PLAIN = {"relative_step": False, "scale_parameter": False}


@HALF
@KERNELS
@pytest.mark.parametrize("beta1", [None, 0.9])
def test_a_step_is_the_definition(dtype, fused, beta1):
    """The float32 twin stands at p + residual. RMS(x) is of the stored p, hence not asked for; see the next test."""
    ours = parameters(SHAPES, dtype)
    twins = parameters(SHAPES)
    options = {**PLAIN, "lr": 1e-3, "beta1": beta1, "weight_decay": 0.1}
    compensated = Adafactor(ours, compensated=True, fused=fused, **options)
    single = Adafactor(twins, fused=fused, **options)
    for t in range(5):
        expected = []
        generator = torch.Generator().manual_seed(t)
        for p, q in zip(ours, twins, strict=True):
            p.grad = torch.randn(p.shape, generator=generator).to(dtype)
            q.grad = p.grad.float()
            residual = compensated.state[p].get("residual", torch.zeros_like(p))
            q.data = p.detach().float() + residual.float()
        single.step()
        for q in twins:
            rounded = q.detach().to(dtype)
            expected.append((rounded, (q.detach() - rounded.float()).bfloat16()))
        compensated.step()
        for p, (rounded, residual) in zip(ours, expected, strict=True):
            # A last bit of difference in the float32 update may tip a tie: then the residual makes up for it.
            same = (p.detach() == rounded) & (compensated.state[p]["residual"] == residual)
            assert same.float().mean() > 0.99
            total = p.detach().double() + compensated.state[p]["residual"].double()
            torch.testing.assert_close(total, rounded.double() + residual.double(), rtol=2e-5, atol=1e-7)


@KERNELS
def test_the_parameter_scale_is_that_of_the_stored_parameter(fused):
    param = torch.nn.Parameter(torch.full((64, 32), 1.0, dtype=torch.bfloat16))
    optimizer = Adafactor([param], lr=0.25, relative_step=False, compensated=True, fused=fused)
    param.grad = torch.zeros_like(param)
    optimizer.step()  # makes the state
    optimizer.state[param]["residual"].fill_(0.00390625)  # half a step between neighbours: RMS(p + residual) is not 1
    param.grad = torch.ones_like(param)
    optimizer.step()
    total = param.detach().float() + optimizer.state[param]["residual"].float()
    u = (1.00390625 - total.mean()) / 0.25
    assert u.item() == pytest.approx(1.0, rel=1e-4)


@HALF
def test_native_and_torch_kernels_agree(dtype):
    """Both round the same float32 numbers but for their last bit."""
    totals = []
    for fused in (None, False):
        ours = parameters(SHAPES, dtype)
        optimizer = Adafactor(ours, lr=1e-3, compensated=True, fused=fused, beta1=0.9, weight_decay=0.1)
        train(optimizer, 20)
        totals.append([p.detach().double() + optimizer.state[p]["residual"].double() for p in ours])
    for a, b in zip(*totals, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=1e-6)


def test_blocks_do_not_matter(monkeypatch):
    results = []
    for limit in (1 << 20, 64):
        monkeypatch.setattr(blocks, "CPU_BLOCK", limit)
        ours = parameters([(40, 30)], torch.bfloat16)
        optimizer = Adafactor(ours, lr=1e-3, d=None, compensated=True, fused=False, min_dim_size_to_factor=99, **PLAIN)
        train(optimizer, 3)
        results.append((ours[0].detach(), optimizer.state[ours[0]]["residual"]))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


@HALF
@KERNELS
def test_the_trajectory_is_float32s(dtype, fused):
    """300 small steps on N(0, 0.02²) weights: rounding to nearest loses most of them, compensation nearly nothing."""
    start = (0.02 * torch.randn(64, 96)).to(dtype)
    gradients = torch.randn(300, 64, 96) + 0.5
    ends = {}
    for name, kind, options in (
        ("float32", torch.float32, {}),
        ("nearest", dtype, {}),
        ("compensated", dtype, {"compensated": True}),
    ):
        param = torch.nn.Parameter(start.to(kind, copy=True))
        optimizer = Adafactor([param], lr=1e-6 if dtype == torch.float16 else 1e-5, fused=fused, **PLAIN, **options)
        for g in gradients:
            param.grad = g.to(dtype).to(kind)
            optimizer.step()
        ends[name] = param.detach().float()
        if name == "compensated":
            ends["total"] = ends[name] + optimizer.state[param]["residual"].float()
    moved = (ends["float32"] - start.float()).norm()
    errors = {name: ((end - ends["float32"]).norm() / moved).item() for name, end in ends.items()}
    assert errors["nearest"] > 0.3
    assert errors["total"] < 0.01
    assert errors["compensated"] < 0.2 * errors["nearest"]


@pytest.mark.parametrize("stochastic", [True, False], ids=["stochastic", "compensated"])
@KERNELS
@pytest.mark.parametrize("shape", [(64, 128), (5000,)], ids=str)
def test_weight_decay_is_not_rounded_away(stochastic, fused, shape):
    """x (1 - 1e-4) rounds to x in bfloat16. The decayed x goes through the update's one rounding."""
    ends = {}
    for name, dtype, options in (
        ("float32", torch.float32, {}),
        ("ours", torch.bfloat16, {"stochastic_rounding": True} if stochastic else {"compensated": True}),
        ("nearest", torch.bfloat16, {}),
    ):
        param = torch.nn.Parameter(torch.linspace(0.01, 1.0, 8192)[: torch.Size(shape).numel()].view(shape).to(dtype))
        start = param.detach().float().mean()
        optimizer = Adafactor([param], lr=1e-3, weight_decay=0.1, fused=fused, **PLAIN, **options)
        param.grad = torch.zeros_like(param)  # nothing but decay
        for _ in range(100):
            optimizer.step()
        ends[name] = (param.detach().float().mean() / start).item()
    assert ends["float32"] == pytest.approx((1 - 1e-4) ** 100, rel=1e-4)
    assert 1 - ends["ours"] == pytest.approx(1 - ends["float32"], rel=0.1)
    assert ends["nearest"] == 1.0


@HALF
@KERNELS
def test_resume_bit_for_bit(dtype, fused, tmp_path):
    ours = parameters(SHAPES, dtype)
    optimizer = Adafactor(ours, compensated=True, beta1=0.9, fused=fused)
    train(optimizer, 4)
    torch.save({"params": [p.detach() for p in ours], "optimizer": optimizer.state_dict()}, tmp_path / "checkpoint.pt")
    pickled = pickle.dumps((ours, optimizer))
    train(optimizer, 4, seed=1)

    saved = torch.load(tmp_path / "checkpoint.pt")
    again = [torch.nn.Parameter(p) for p in saved["params"]]
    resumed = Adafactor(again)
    resumed.load_state_dict(saved["optimizer"])
    unpickled, from_pickle = pickle.loads(pickled)
    for params, other in ((again, resumed), (unpickled, from_pickle)):
        train(other, 4, seed=1)
        for a, b in zip(ours, params, strict=True):
            assert torch.equal(a, b)
            assert other.state[b]["residual"].dtype == torch.bfloat16
            assert torch.equal(optimizer.state[a]["residual"], other.state[b]["residual"])


@KERNELS
def test_a_gradient_that_is_not_finite_leaves_parameter_and_residual_alone(fused):
    (param,) = parameters([(50, 40)], torch.bfloat16)
    optimizer = Adafactor([param], compensated=True, fused=fused, weight_decay=0.1)
    train(optimizer, 3)
    # Halves of a step between neighbours are ties: rounding x + residual once more would move some of these.
    ulp = torch.ldexp(torch.ones(50, 40), torch.frexp(param.detach().float()).exponent - 8)
    optimizer.state[param]["residual"].copy_(ulp / 2)
    before, state = param.detach().clone(), copy.deepcopy(optimizer.state[param])
    param.grad = torch.full_like(param, float("nan"))
    optimizer.step()
    assert torch.equal(param, before)
    assert all(torch.equal(value, state[name]) for name, value in optimizer.state[param].items())
    assert optimizer.skipped == 1


@KERNELS
def test_an_infinite_parameter_has_no_residual(fused):
    param = torch.nn.Parameter(torch.full((4, 3), 65000.0, dtype=torch.float16))
    optimizer = Adafactor([param], lr=1e4, compensated=True, maximize=True, fused=fused, **PLAIN)
    param.grad = torch.ones_like(param)
    for _ in range(2):
        optimizer.step()
    assert param.isposinf().all()
    assert not optimizer.state[param]["residual"].any()


def test_wide_parameters_have_no_residual_and_the_same_bits():
    for dtype in (torch.float32, torch.float64):
        ours, theirs = parameters(SHAPES, dtype), parameters(SHAPES, dtype)
        a, b = Adafactor(ours, compensated=True), Adafactor(theirs)
        train(a, 3)
        train(b, 3)
        assert all(torch.equal(p, q) for p, q in zip(ours, theirs, strict=True))
        assert not any("residual" in values for values in a.state.values())


@KERNELS
def test_a_group_may_switch_it_on_and_off(fused):
    ours = parameters([(20, 30)], torch.bfloat16)
    optimizer = Adafactor([{"params": ours, "compensated": False}], lr=1e-4, compensated=True, fused=fused)
    step(optimizer)
    assert "residual" not in optimizer.state[ours[0]]
    optimizer.param_groups[0]["compensated"] = True
    step(optimizer, 1)
    residual = optimizer.state[ours[0]]["residual"].clone()
    assert residual.any()
    optimizer.param_groups[0]["compensated"] = False
    step(optimizer, 2)
    assert torch.equal(optimizer.state[ours[0]]["residual"], residual)


def test_compiled():
    eager, compiled = parameters(SHAPES, torch.bfloat16), parameters(SHAPES, torch.bfloat16)
    a, b = (Adafactor(params, compensated=True, beta1=0.9) for params in (eager, compiled))
    step_b = torch.compile(lambda: b.step(), fullgraph=True, backend="aot_eager")
    for t in range(2):
        generator = torch.Generator().manual_seed(t)
        for p, q in zip(eager, compiled, strict=True):
            p.grad = torch.randn(p.shape, generator=generator).bfloat16()
            q.grad = p.grad.clone()
        a.step()
        step_b()
    for p, q in zip(eager, compiled, strict=True):
        assert torch.equal(p, q)
        assert torch.equal(a.state[p]["residual"], b.state[q]["residual"])


def test_not_with_stochastic_rounding():
    with pytest.raises(ValueError, match=r"^compensated must be False beside stochastic_rounding=True, got True\."):
        Adafactor(parameters([(2, 2)]), compensated=True, stochastic_rounding=True)
    with pytest.raises(TypeError, match=r"^compensated must be True or False, got 1\."):
        Adafactor(parameters([(2, 2)]), compensated=1)
