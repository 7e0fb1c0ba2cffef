"""What a captured step reads is the graph's own, and lives: capture and replay re-enacted in Triton's interpreter."""

import copy
import gc
import weakref
from types import SimpleNamespace

import pytest
import torch
from torch_support import parameters
from triton_graphs import Graph
from triton_support import DEVICE, use

from adafactor.engine.torch import cuda
from adafactor.torch import Adafactor

pytestmark = pytest.mark.skipif(DEVICE.type != "cpu", reason="a device has graphs of its own: test_gpu.py")
SGD = {"relative_step": False, "scale_parameter": False, "d": None, "capturable": False}


@pytest.fixture
def kernel(monkeypatch):
    return use(monkeypatch)


def made(shape=(4, 16), lr=1e-2, **options):
    param = torch.nn.Parameter(torch.ones(shape))
    param.grad = torch.ones(shape)
    optimizer = Adafactor([param], lr=lr, **{**SGD, **options})
    optimizer.step()  # the warm-up that docs/torch.md asks for
    return param, optimizer


def moved(param, run):
    before = param.detach().clone()
    run()
    return (param.detach() - before).mean().item()


def test_a_replay_reads_a_table_of_its_own(kernel, monkeypatch):
    param, optimizer = made()
    static = param.grad
    with Graph(monkeypatch) as graph:
        optimizer.step()
    assert moved(param, graph.replay) == pytest.approx(-0.01, rel=1e-5)
    param.grad, optimizer.param_groups[0]["lr"] = -torch.ones(4, 16), 5e-3  # a last, smaller batch, say
    assert moved(param, optimizer.step) == pytest.approx(0.005, rel=1e-5)
    param.grad = static
    assert moved(param, graph.replay) == pytest.approx(-0.01, rel=1e-5)


def test_two_graphs_do_not_share_one(kernel, monkeypatch):
    param, optimizer = made()
    graphs = []
    for sign in (1.0, -1.0):
        param.grad = torch.full((4, 16), sign)
        with Graph(monkeypatch) as graph:
            optimizer.step()
        graphs.append((graph, param.grad))
    for _ in range(2):
        assert moved(param, graphs[0][0].replay) == pytest.approx(-0.01, rel=1e-5)
        assert moved(param, graphs[1][0].replay) == pytest.approx(0.01, rel=1e-5)


def test_a_list_first_seen_in_a_capture_is_complete_for_the_next_eager_step(kernel, monkeypatch):
    params = [torch.nn.Parameter(torch.ones(4, 16)) for _ in range(2)]
    optimizer = Adafactor(params, lr=1e-2, **SGD)
    for p in params:
        p.grad = torch.ones(4, 16)
    optimizer.step()

    def step():
        optimizer.step_param(params[0])  # a list of one

    with Graph(monkeypatch) as graph:
        step()
    assert moved(params[0], step) == pytest.approx(-0.01, rel=1e-5)  # before any replay
    assert moved(params[0], graph.replay) == pytest.approx(-0.01, rel=1e-5)
    assert moved(params[1], optimizer.step) == pytest.approx(-0.01, rel=1e-5)


def change_lists(optimizer, params):
    for p in params:
        optimizer.step_param(p)


CHANGES = {
    "other lists": change_lists,
    "add_param_group": lambda optimizer, params: optimizer.add_param_group(
        {"params": [torch.nn.Parameter(torch.ones(2))]}
    ),
    "load_state_dict": lambda optimizer, params: optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict())),
    "state": lambda optimizer, params: optimizer.state.clear(),
    "data": lambda optimizer, params: [setattr(p, "data", p.data.clone()) for p in params],
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_what_a_graph_reads_is_not_freed(kernel, monkeypatch, change):
    """Every address in the tables that a capture recorded belongs to memory that lives as long as the optimizer."""
    params = parameters([(4, 16), (8, 40), *[(3,)] * 10])
    optimizer = Adafactor(params, lr=1e-2, **SGD)
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    addresses = {t.data_ptr() for p in params for t in (p, *optimizer.state[p].values())}
    with Graph(monkeypatch) as graph:
        optimizer.step()
    skipped = next(iter(optimizer._skipped.values()))
    tensors = [a for _, args, _ in graph.recorded for a in args if isinstance(a, torch.Tensor) and a is not skipped]
    tables = {t.untyped_storage().data_ptr() for t in tensors}
    assert len(tables) > 12
    del tensors
    graph.recorded.clear()
    change(optimizer, params)
    if change is not change_lists:
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer.step()
    gc.collect()
    (held,) = cuda._captured[skipped]
    assert addresses <= {t.data_ptr() for t in held}
    assert tables <= {t.untyped_storage().data_ptr() for t in held}


def test_nothing_is_kept_longer_than_the_optimizer(kernel, monkeypatch):
    param, optimizer = made()
    with Graph(monkeypatch) as graph:
        optimizer.step()
    graph.recorded.clear()
    row = weakref.ref(optimizer.state[param]["row"])
    del optimizer
    gc.collect()
    assert row() is None
    assert not cuda._captured


def test_lists_that_are_stepped_in_turn_share_their_largest_buffer(kernel, monkeypatch):
    made, build = [], cuda.Triton._build
    monkeypatch.setattr(cuda.Triton, "_build", lambda self: (made.append(self), build(self))[1])
    params = parameters([(8, 40), (4, 16), (5, 3)])
    optimizer = Adafactor(params)
    for p in params:
        p.grad = torch.ones_like(p)
        optimizer.step()
        p.grad = None
    assert len(made) == 3
    assert len({tables.sums.data_ptr() for tables in made}) == 1


def test_whatever_was_made_anew_is_held_for_every_other_stream(kernel, monkeypatch):
    _, optimizer = made()
    (prepared,) = optimizer._preparation._prepared.values()
    ((backend, _),) = prepared.plan.backends
    cuda_device, held = SimpleNamespace(type="cuda"), []
    monkeypatch.setattr(backend, "device", cuda_device)

    def step_on(stream):
        monkeypatch.setattr(torch.accelerator, "current_stream", lambda device: stream)
        buffer = SimpleNamespace(device=cuda_device, record_stream=held.append)
        backend.tables.tensors, backend.sums = [buffer], buffer
        backend._guard()

    backend._build()
    for stream in ("first", "second", "first"):
        step_on(stream)
    assert held == ["second"] * 2
    backend._build()  # as where a group has changed
    for stream in ("second", "first", "second"):
        step_on(stream)
    assert held == ["second"] * 2 + ["first"] * 2
