"""Gradient release in a loop that calls step(), with accumulation and with clipping: the ordinary loop's steps."""

import pytest
import torch
from tied import Tied, assert_same, groups, loss_of
from torch import nn

from adafactor.torch import Adafactor, HostStep, step_in_backward


def ordinary(steps, micro=1, max_norm=None, per_tensor=False, dtype=torch.float32):
    model = Tied().to(dtype)
    optimizer = Adafactor(groups(model), seed=0)
    norms = []
    for t in range(steps):
        for k in range(micro):
            (loss_of(model, micro * t + k) / micro).backward()
        if max_norm is not None:
            trained = [p for p in model.parameters() if p.requires_grad]
            for params in [[p] for p in trained] if per_tensor else [trained]:
                norms.append(nn.utils.clip_grad_norm_(params, max_norm))
        optimizer.step()
        optimizer.zero_grad()
    return optimizer, model, norms


def test_a_loop_that_calls_step_and_zero_grad():
    """Step hooks run, closures are evaluated once, and step() between steps changes nothing."""
    model = Tied()
    optimizer = Adafactor(groups(model), seed=0)
    step_in_backward(model, optimizer, loop="framework")
    schedule = torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)
    calls = []
    optimizer.register_step_post_hook(lambda *_: calls.append("hook"))
    for t in range(4):

        def closure(t=t):
            optimizer.zero_grad()
            loss = loss_of(model, t)
            loss.backward()
            return loss

        if t % 2:
            assert optimizer.step(closure) is not None
        else:
            closure()
            optimizer.step()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    assert len(calls) == 8
    assert_same(*ordinary(4)[:2], optimizer, model)


def test_step_of_a_framework_steps_what_still_has_a_gradient():
    model, other = nn.Linear(3, 2), nn.Linear(3, 2)
    other.load_state_dict(model.state_dict())
    optimizer, its = Adafactor(model.parameters()), Adafactor(other.parameters())
    step_in_backward(model, optimizer, loop="framework")
    for layer, stepped in ((model, optimizer), (other, its)):
        for param in layer.parameters():
            param.grad = torch.ones_like(param)
        stepped.step()
    assert model.weight.grad is None
    assert_same(optimizer, model, its, other)


def test_step_of_a_framework_returns_when_the_weights_are_back_from_the_host(monkeypatch):
    model = Tied()
    optimizer = Adafactor(groups(model), seed=0)
    host = HostStep(model, optimizer, master=None)
    step_in_backward(model, optimizer, loop="framework")
    wait, waits = host.wait, []
    monkeypatch.setattr(host, "wait", lambda: waits.append(1) or wait())
    for t in range(3):
        loss_of(model, t).backward()
        waits.clear()
        optimizer.step()
        assert waits
        optimizer.zero_grad()
    host.remove()
    expected = ordinary(3)[1]
    assert all(map(torch.equal, expected.parameters(), model.parameters()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_accumulation_steps(dtype):
    """Ten micro-batches of four: two steps, and the loop's step() for the two that are left."""
    model = Tied().to(dtype)
    optimizer = Adafactor(groups(model), seed=0)
    released = step_in_backward(model, optimizer, loop="framework", accumulation_steps=4)
    for k in range(8):
        (loss_of(model, k) / 4).backward()
        assert (model.head.weight.grad is None) == (k % 4 == 3)
    assert_same(*ordinary(2, micro=4, dtype=dtype)[:2], optimizer, model)
    before = model.head.weight.detach().clone()
    for k in range(2):
        (loss_of(model, k) / 4).backward()
    assert torch.equal(before, model.head.weight)
    optimizer.step()
    assert not torch.equal(before, model.head.weight)
    released.accumulation_steps = 1
    loss_of(model, 0).backward()
    assert all(p.grad is None for p in model.parameters())
    assert {int(state["step"]) for state in optimizer.state.values() if state} == {4}


@pytest.mark.parametrize("micro", [1, 2])
@pytest.mark.parametrize("max_norm", [0.3, 1e6])
def test_the_norm_of_all_gradients(micro, max_norm):
    """Against clip_grad_norm_ and step(); two passes where nothing is accumulated, and never all gradients."""
    expected, its, norms = ordinary(3, micro, max_norm)
    model = Tied()
    optimizer = Adafactor(groups(model), seed=0)
    released = step_in_backward(model, optimizer, max_norm=max_norm, accumulation_steps=micro)
    found = []
    for k in range(3 * micro):
        norm = released.backward(loss_of(model, k) / micro)
        found += [norm] if k % micro == micro - 1 else []
    torch.testing.assert_close(torch.stack(found), torch.stack(norms), rtol=1e-6, atol=0.0)
    for p, q in zip(its.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)
    assert {int(state["step"]) for state in optimizer.state.values()} == {3}
    assert expected.skipped == optimizer.skipped == 0


def test_the_first_pass_gives_others_no_gradient():
    model, outside = nn.Linear(3, 2), nn.Parameter(torch.ones(()))
    released = step_in_backward(model, Adafactor(model.parameters()), max_norm=1e6)
    loss = (model(torch.ones(1, 3)) * outside).sum()
    (expected,) = torch.autograd.grad(loss, outside, retain_graph=True)
    released.backward(loss)
    assert torch.equal(outside.grad, expected)


def test_the_norm_of_each_gradient():
    _, its, _ = ordinary(3, max_norm=0.05, per_tensor=True)
    model = Tied()
    step_in_backward(model, optimizer := Adafactor(groups(model), seed=0), max_norm=0.05, clip="tensor")
    for t in range(3):
        loss_of(model, t).backward()
    for p, q in zip(its.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)
    assert optimizer.state


def test_a_plain_backward_cannot_know_the_norm():
    model = nn.Linear(3, 2)
    optimizer = Adafactor(model.parameters())
    step_in_backward(model, optimizer, max_norm=1.0)
    with pytest.raises(RuntimeError, match=r"^max_norm must be None with loss\.backward\(\), got 1\.0\. Call backward"):
        model(torch.ones(1, 3)).sum().backward()
    assert not optimizer.state


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"loop": "theirs"}, r'^loop must be "own" or "framework"'),
        ({"accumulation_steps": 0}, r"^accumulation_steps must be an integer >= 1, got 0"),
        ({"max_norm": -1.0}, r"^max_norm must be >= 0 and finite, or None, got -1\.0"),
        ({"max_norm": 1.0, "clip": "each"}, r'^clip must be "global" or "tensor", got \'each\''),
    ],
)
def test_arguments_that_do_not_fit(options, text):
    model = nn.Linear(3, 2)
    optimizer = Adafactor(model.parameters())
    with pytest.raises(ValueError, match=text):
        step_in_backward(model, optimizer, **options)
    step_in_backward(model, optimizer).remove()


def test_compiled_autograd_tells_no_passes():
    from torch._dynamo import compiled_autograd

    model = nn.Linear(3, 2)
    optimizer = Adafactor(model.parameters())
    step_in_backward(model, optimizer, accumulation_steps=2)
    with (
        compiled_autograd._enable(torch.compile(backend="eager", fullgraph=False)),
        pytest.raises(RuntimeError, match=r"^torch\.compile must be without compiled autograd"),
    ):
        model(torch.ones(1, 3)).sum().backward()
    assert not optimizer.state
