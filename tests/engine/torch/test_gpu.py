"""What only a CUDA device can show: no waiting, graph capture, launches, memory. ``test_triton.py`` runs there too."""

import pytest
import torch
from torch_support import parameters

from adafactor.torch import Adafactor

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

SHAPES = [(512, 1024), (1024, 16), (16, 1024), (1000,), (64, 3, 3), (300, 20000)]
OPTIONS = [
    {},
    {"beta1": 0.9, "momentum_dtype": torch.int8, "weight_decay": 0.1},
    {"stochastic_rounding": True, "scale_parameter": False, "d": None},
]


def made(dtype=torch.float32, shapes=SHAPES, **options):
    params = [torch.nn.Parameter(p.detach().cuda()) for p in parameters(shapes, dtype)]
    for p in params:
        p.grad = torch.randn_like(p)
    return params, Adafactor(params, fused=True, **options)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_triton_and_torch_operations_agree(dtype, options):
    ends = []
    for fused in (True, False):
        torch.manual_seed(0)
        params, optimizer = made(dtype, **options)
        optimizer.param_groups[0]["fused"] = fused
        for _ in range(5):
            optimizer.step()
        ends.append(params)
    for a, b in zip(*ends, strict=True):
        if options.get("stochastic_rounding") and dtype != torch.float32:
            assert (a != b).float().mean() < 0.05
            continue
        # A last bit of difference may tip the draw of a number of 8-bit momentum.
        tipped = 1e-3 if options.get("momentum_dtype") == torch.int8 else 0
        close = torch.isclose(a, b, rtol=2e-2 if dtype != torch.float32 else 1e-4, atol=1e-4)
        assert (~close).float().mean() <= tipped


def test_a_run_repeats_bit_for_bit():
    ends = []
    for _ in range(2):
        torch.manual_seed(0)
        params, optimizer = made(torch.bfloat16, stochastic_rounding=True, beta1=0.9, momentum_dtype=torch.int8)
        for _ in range(5):
            optimizer.step()
        ends.append(params)
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_no_step_waits_for_the_device(options):
    params, optimizer = made(lr=torch.tensor(1e-2, device="cuda"), **options)
    optimizer.step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            for p in params:
                p.grad = torch.randn_like(p)
            optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_captured_step_replays_with_another_learning_rate(options):
    (captured, graphed), (plain, eager) = (
        made(lr=torch.tensor(1e-2, device="cuda"), capturable=True, relative_step=False, **options) for _ in range(2)
    )
    for p, q in zip(captured, plain, strict=True):
        q.grad = p.grad.clone()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        graphed.step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    read = [p.grad for p in captured]  # every replay reads them
    with torch.cuda.graph(graph):
        for p, g in zip(captured, read, strict=True):
            p.grad = g * 1.0  # memory that the graph owns
        graphed.step()
    eager.step()
    for lr in (1e-2, 1e-3, 1e-4):
        for optimizer in (graphed, eager):
            optimizer.param_groups[0]["lr"].fill_(lr)
        graph.replay()
        eager.step()
    for p, q in zip(captured, plain, strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=0)
    assert int(graphed.state[captured[0]]["step"]) == int(eager.state[plain[0]]["step"]) == 4


def test_a_capture_without_capturable_or_without_state_is_refused():
    for options, text in (({}, "capturable is False"), ({"capturable": True}, "the state of a captured step must be")):
        _, optimizer = made(**options)
        with pytest.raises(RuntimeError, match=text), torch.cuda.graph(torch.cuda.CUDAGraph()):
            optimizer.step()
        torch.cuda.synchronize()


def test_launches_do_not_grow_with_the_number_of_tensors():
    counts = []
    for times in (1, 100):
        _, optimizer = made(shapes=[(16, 1024), (1024, 16), (1024,)] * times)
        optimizer.step()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            optimizer.step()
            torch.cuda.synchronize()
        on_device = [event for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
        counts.append(sum(not event.name.startswith(("Memcpy", "Memset")) for event in on_device))
    assert counts[0] == counts[1] <= 10


def test_a_step_needs_no_memory_of_parameter_size():
    shapes = [(4096, 4096)] * 16
    params, optimizer = made(shapes=shapes)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    for _ in range(2):
        optimizer.step()
    extra = torch.cuda.max_memory_allocated() - before
    size = sum(p.numel() * p.element_size() for p in params)
    assert 0 < extra < 0.02 * size
