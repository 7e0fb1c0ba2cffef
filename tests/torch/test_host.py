"""HostStep against the ordinary step of the same weights on the CPU, bit for bit."""

import copy
import io
from contextlib import nullcontext

import pytest
import torch
from torch import nn

from adafactor import plan
from adafactor.planning import on_host
from adafactor.torch import Adafactor, HostStep, step_in_backward


def model(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(50, 24), nn.Linear(24, 64), nn.Tanh(), nn.Linear(64, 24), nn.Linear(24, 50)).to(
        dtype
    )


def batches(count):
    torch.manual_seed(1)
    return [(torch.randint(50, (16,)), torch.randint(50, (16,))) for _ in range(count)]


def backward(net, batch, scale=1.0):
    x, y = batch
    (nn.functional.cross_entropy(net(x).float(), y) * scale).backward()


def same(a, b):
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


ARGUMENTS = [
    {"lr": 0.1},
    {"lr": 0.1, "beta1": 0.9, "weight_decay": 0.01, "momentum_dtype": torch.bfloat16},
    {"lr": torch.tensor(0.1), "factoring": "smallest", "fused": False},
]


@pytest.mark.parametrize("arguments", ARGUMENTS)
@pytest.mark.parametrize("in_backward", [False, True])
def test_is_the_ordinary_step_with_a_scheduler(arguments, in_backward):
    nets = [model(), model()]
    optimizers = [Adafactor(net.parameters(), **{**arguments, "lr": copy.deepcopy(arguments["lr"])}) for net in nets]
    host = HostStep(nets[1], optimizers[1])
    schedulers = [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.8) for optimizer in optimizers]
    handle = step_in_backward(nets[1], optimizers[1]) if in_backward else None
    for batch in batches(6):
        for net, optimizer, scheduler in zip(nets, optimizers, schedulers, strict=True):
            optimizer.zero_grad()
            backward(net, batch)
            if optimizer is optimizers[0] or handle is None:
                optimizer.step()
            scheduler.step()
    host.wait()
    assert same(*nets)
    assert host.moved == [6 * sum(p.nbytes for p in nets[1].parameters())] * 2
    for a, b in zip(*(net.parameters() for net in nets), strict=True):
        for slot, value in optimizers[0].state[a].items():
            assert torch.equal(value, optimizers[1].state[b][slot]), slot


@pytest.mark.parametrize(
    "settings", [{"accumulation_steps": 2}, {"max_norm": 0.05}, {"accumulation_steps": 2, "max_norm": 0.05}]
)
def test_accumulation_and_clipping_by_the_norm_of_all_gradients(settings):
    count = settings.get("accumulation_steps", 1)
    nets = [model(), model()]
    optimizers = [Adafactor(net.parameters(), lr=0.1) for net in nets]
    host = HostStep(nets[1], optimizers[1])
    handle = step_in_backward(nets[1], optimizers[1], **settings)
    for number, batch in enumerate(batches(6)):
        backward(nets[0], batch, 1 / count)
        x, y = batch
        handle.backward(nn.functional.cross_entropy(nets[1](x).float(), y) / count)
        if number % count == count - 1:
            if "max_norm" in settings:
                nn.utils.clip_grad_norm_(nets[0].parameters(), settings["max_norm"])
            optimizers[0].step()
            optimizers[0].zero_grad()
    host.wait()
    for a, b in zip(*(net.parameters() for net in nets), strict=True):
        assert torch.allclose(a, b, rtol=0, atol=0 if "max_norm" not in settings else 1e-6)


@pytest.mark.parametrize("kind", ["master", "stochastic_rounding", "compensated"])
def test_bfloat16_weights_have_masters_or_round_on_the_host(kind):
    nets = [model(torch.float32 if kind == "master" else torch.bfloat16), model(torch.bfloat16)]
    with torch.no_grad():
        for a, b in zip(*(net.parameters() for net in nets), strict=True):
            a.copy_(b)
    arguments = {"lr": 1e-2, "seed": 3, **({} if kind == "master" else {kind: True})}
    optimizers = [Adafactor(net.parameters(), **arguments) for net in nets]
    host = HostStep(nets[1], optimizers[1], master=torch.float32 if kind == "master" else None)
    for batch in batches(5):
        nets[1].zero_grad()
        backward(nets[1], batch)
        for a, b in zip(*(net.parameters() for net in nets), strict=True):
            a.grad = b.grad.to(a.dtype)
        for optimizer in optimizers:
            optimizer.step()
    for a, b in zip(*(net.parameters() for net in nets), strict=True):
        assert torch.equal(a.bfloat16(), b)
        if kind == "master":
            assert torch.equal(a, optimizers[1].state[b]["master"])
    assert host.host_bytes["weights"] == sum(p.nbytes for p in nets[0].parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resumes_bit_for_bit_with_a_host_and_without(dtype):
    def start():
        net = model(dtype)
        optimizer = Adafactor(net.parameters(), lr=1e-2, beta1=0.9)
        return net, optimizer, HostStep(net, optimizer)

    net, optimizer, _ = start()
    for batch in batches(3):
        net.zero_grad()
        backward(net, batch)
        optimizer.step()
    file = io.BytesIO()
    torch.save([net.state_dict(), optimizer.state_dict()], file)
    file.seek(0)
    weights, state = torch.load(file, weights_only=True)
    again, resumed, _ = start()
    again.load_state_dict(weights)
    resumed.load_state_dict(state)
    for batch in batches(6)[3:]:
        for each, its in ((net, optimizer), (again, resumed)):
            each.zero_grad()
            backward(each, batch)
            its.step()
    assert same(net, again)
    if dtype == torch.float32:
        plain = model()
        on_device = Adafactor(plain.parameters(), lr=1e-2, beta1=0.9)
        plain.load_state_dict(weights)
        on_device.load_state_dict(state)
        for batch in batches(6)[3:]:
            plain.zero_grad()
            backward(plain, batch)
            on_device.step()
        assert same(net, plain)


def test_removed_it_goes_on_where_the_weights_are():
    nets = [model(), model()]
    optimizers = [Adafactor(net.parameters(), lr=0.1) for net in nets]
    host = HostStep(nets[1], optimizers[1])
    for number, batch in enumerate(batches(4)):
        if number == 2:
            host.remove()
        for net, optimizer in zip(nets, optimizers, strict=True):
            net.zero_grad()
            backward(net, batch)
            optimizer.step()
    assert same(*nets)


def test_an_error_of_the_thread_is_raised_and_the_next_step_works():
    net = model()
    optimizer = Adafactor(net.parameters(), lr=0.1)
    HostStep(net, optimizer)
    backward(net, batches(1)[0])
    optimizer.param_groups[0]["d"] = -1.0
    with pytest.raises(ValueError, match="d must be"):
        optimizer.step()
    optimizer.param_groups[0]["d"] = 1.0
    before = [p.clone() for p in net.parameters()]
    optimizer.step()
    assert not any(torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))


def test_what_others_write_is_stepped_on_and_gradients_that_are_not_finite_are_counted():
    net = model()
    optimizer = Adafactor(net.parameters(), lr=0.1, diagnostics=True)
    host = HostStep(net, optimizer)
    weight = net[1].weight
    for _ in range(2):
        with torch.no_grad():
            weight.fill_(1.0)
        weight.grad = torch.ones_like(weight)
        optimizer.step()
        assert float(weight.detach().min()) == pytest.approx(0.9, rel=0.3)
    weight.grad = torch.full_like(weight, torch.nan)
    before = weight.detach().clone()
    optimizer.step()
    assert torch.equal(weight, before)
    assert optimizer.skipped == 1
    assert float(next(iter(optimizer.diagnostics().values()))["skipped"]) == 1
    with pytest.raises(RuntimeError, match="a second HostStep"):
        HostStep(net, optimizer)
    with pytest.raises(TypeError, match="optimizer must be an adafactor"):
        HostStep(net, torch.optim.SGD(net.parameters()))
    host.remove()


class Recorder:
    """The module of a device whose streams only say what they are asked for."""

    def __init__(self):
        self.said = []

    def current_stream(self, device):
        return self

    def record_event(self):
        self.said.append("ready")

        return "event"

    def Stream(self, device):
        return self

    def stream(self, stream):
        return nullcontext()

    def wait_event(self, event):
        self.said.append("wait for ready")

    def synchronize(self):
        self.said.append("synchronize")

    def wait_stream(self, stream):
        self.said.append("the device waits")


def test_copies_follow_the_gradient_and_the_device_waits_for_the_weights(monkeypatch):
    recorder = Recorder()
    monkeypatch.setattr("adafactor.torch.host._streams_of", lambda device: recorder)
    net = model()
    optimizer = Adafactor(net.parameters(), lr=0.1)
    host = HostStep(net, optimizer)
    backward(net, batches(1)[0])
    recorder.said.clear()
    copy_, step = torch.Tensor.copy_, Adafactor._step_chosen

    def noted_copy(room, *rest, **named):
        recorder.said.append("copy")
        return copy_(room, *rest, **named)

    def noted_step(*arguments):
        with monkeypatch.context() as inside:
            inside.setattr(torch.Tensor, "copy_", copy_)
            step(*arguments)
        recorder.said.append("step")

    monkeypatch.setattr(torch.Tensor, "copy_", noted_copy)
    monkeypatch.setattr(Adafactor, "_step_chosen", noted_step)
    host.take([(0, [1])])
    host.wait()
    monkeypatch.undo()
    each = ["ready", "wait for ready", "copy", "synchronize", "step", "copy", "synchronize"]
    assert recorder.said == [*each, "the device waits"]


def test_host_memory_is_the_weights_and_next_to_nothing():
    net = nn.Linear(2048, 2048, bias=False)
    for dtype, limit in ((torch.float32, 4.01), (torch.bfloat16, 2.02)):
        net = net.to(dtype)
        optimizer = Adafactor(net.parameters(), lr=0.1)
        host = HostStep(net, optimizer, master=None)
        net(torch.ones(1, 2048, dtype=dtype)).sum().backward()
        optimizer.step()
        found = host.host_bytes
        assert (found["weights"] + found["state"]) / 2048**2 <= limit
        planned = on_host(plan([(2048, 2048)], dtype=str(dtype).removeprefix("torch.")), 1e9, 1e9)[-1]
        assert (sum(found.values()), host.moved[0]) == (planned.host, planned.bus)
        host.remove()
