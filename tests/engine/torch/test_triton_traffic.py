"""What a step moves and launches, counted in Triton's interpreter: ``pytest -s`` prints the bytes per parameter."""

import pytest
import torch
from torch_support import parameters
from triton.runtime import interpreter
from triton_support import DEVICE, use
from triton_traffic import Traffic

from adafactor.cli.bench.shapes import GPT2_SMALL, LLAMA_LAYER, LORA, MATRIX, transformer
from adafactor.core.canonical import canonical
from adafactor.engine.torch import cuda
from adafactor.engine.torch.triton import table, uploads
from adafactor.torch import Adafactor

pytestmark = pytest.mark.skipif(DEVICE.type != "cpu", reason="counted in the interpreter")


def made(dtype, shapes, **options):
    params = [torch.nn.Parameter(p.detach().to(dtype)) for p in parameters(shapes)]
    for p in params:
        p.grad = torch.ones_like(p)
    return params, Adafactor(params, **options)


@pytest.mark.parametrize(
    ("dtype", "limits"), [(torch.float32, (20.1, 16.1)), (torch.bfloat16, (10.1, 8.1))], ids=["float32", "bfloat16"]
)
def test_bytes_per_parameter(monkeypatch, dtype, limits):
    """The first step reads x for its scale; the second knows Σx² from the first, which wrote x."""
    use(monkeypatch, small=False)
    monkeypatch.setattr(table, "WARPS", 0)  # in parts as long as a model has that fills a device
    shape = (768, 4096)
    _, optimizer = made(dtype, [shape])
    for step, limit in enumerate(limits):
        with Traffic(monkeypatch) as traffic:
            optimizer.step()
        moved = traffic.bytes / (shape[0] * shape[1])
        print(f"\n{dtype}, step {step + 1}: {moved:.3f} bytes per parameter, {traffic.launches} launches")
        assert limit - 0.1 <= moved <= limit


@pytest.mark.parametrize(
    ("dtype", "options", "limits"),
    [
        (torch.float32, {}, (16.8, 12.8)),
        (torch.bfloat16, {}, (8.8, 6.8)),
        (torch.float32, {"beta1": 0.9, "momentum_dtype": torch.int8}, (18.9, 14.9)),
    ],
    ids=["float32", "bfloat16", "int8 momentum"],
)
@pytest.mark.parametrize("shape", [(16, 1024), (1024, 16)], ids=str)
def test_bytes_per_parameter_of_what_one_program_holds(monkeypatch, dtype, options, limits, shape):
    """One read of g, one read and one write of x, and the statistics' 8 bytes each."""
    use(monkeypatch, small=False)
    _, optimizer = made(dtype, [shape] * 3, **options)
    for step, limit in enumerate(limits):
        with Traffic(monkeypatch) as traffic:
            optimizer.step()
        moved = traffic.bytes / (3 * shape[0] * shape[1])
        print(f"\n{dtype}, step {step + 1}: {moved:.3f} bytes per parameter, {traffic.launches} launches")
        assert limit - 0.8 <= moved <= limit
        assert traffic.launches == 2


def traffic_of(monkeypatch, optimizer):
    with Traffic(monkeypatch) as traffic:
        optimizer.step()
    return traffic.bytes


@pytest.mark.parametrize(
    "write",
    [lambda p: p.mul_(3), lambda p: setattr(p, "data", p.data * 3), lambda p: p.copy_(p * 3)],
    ids=["in place", "data", "copy"],
)
@pytest.mark.parametrize("shape", [(8, 20), (40,), (2, 3, 3)], ids=str)
def test_what_a_user_writes_is_seen(monkeypatch, write, shape):
    use(monkeypatch)
    (p,), optimizer = made(torch.float32, [shape], lr=1e-2, relative_step=False, diagnostics=True)
    optimizer.step()
    with torch.no_grad():
        write(p)
    expected = p.detach().double().square().mean().sqrt()
    p.grad = torch.ones_like(p)
    optimizer.step()
    assert optimizer.diagnostics()["0"]["parameter_scale"].item() == pytest.approx(expected.item(), rel=1e-6)


def test_views_of_one_tensor_count_for_each_other(monkeypatch):
    use(monkeypatch)
    both = torch.ones(2, 8, 20)
    params = [torch.nn.Parameter(view) for view in both]
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer = Adafactor(params, diagnostics=True)
    for _ in range(3):
        optimizer.step()
        with torch.no_grad():
            params[1].mul_(3)
        expected = [p.detach().double().square().mean().sqrt().item() for p in params]
        optimizer.step()
        recorded = optimizer.diagnostics()
        assert [recorded[k]["parameter_scale"].item() for k in "01"] == pytest.approx(expected, rel=1e-6)
    assert params[0]._version == params[1]._version


def test_what_no_counter_counts_is_seen_after_so_many_steps(monkeypatch):
    use(monkeypatch)
    monkeypatch.setattr(cuda, "REMEASURE", 4)
    (p,), optimizer = made(torch.float32, [(8, 20)], diagnostics=True)
    optimizer.step()
    p.data.mul_(3)  # the same memory, and no new version
    seen = []
    for _ in range(4):
        expected = p.detach().double().square().mean().sqrt().item()
        optimizer.step()
        seen.append(optimizer.diagnostics()["0"]["parameter_scale"].item() == pytest.approx(expected, rel=1e-5))
    assert seen[-1]


def test_sums_that_apply_leaves_are_those_that_measure_finds(monkeypatch):
    """Wide rows that apply cuts finer, rows of a few columns, matrices that share a tile, vectors, slices."""
    use(monkeypatch)
    shapes = [(8, 20), (3, 600), (2, 150), (40,), (700,), (9, 3, 3), (2, 3, 3, 4)]
    ends = []
    for every in (1, 1000):
        monkeypatch.setattr(cuda, "REMEASURE", every)
        params, optimizer = made(torch.float32, shapes, diagnostics=True)
        moved = []
        for seed in range(3):
            for p in params:
                p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(seed))
            moved.append(traffic_of(monkeypatch, optimizer))
        ends.append((params, moved))
    for a, b in zip(ends[0][0], ends[1][0], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=0)
    assert ends[0][1][0] == ends[1][1][0]
    assert ends[1][1][2] < ends[0][1][2]


@pytest.mark.parametrize(
    "shapes", [MATRIX, LLAMA_LAYER, GPT2_SMALL, LORA[:20], LORA, transformer(4096, 2, 128256)],
    ids=["matrix", "Llama layer", "GPT-2", "LoRA of 20", "LoRA of 1000", "vocabulary"],
)  # fmt: skip
def test_a_step_is_ten_launches_at_most(monkeypatch, shapes):
    use(monkeypatch, small=False)
    params = [torch.nn.Parameter(torch.empty(1).expand(shape)) for shape in shapes]  # no memory, and no launch runs
    monkeypatch.setattr(uploads, "form_of", lambda w: canonical(w.layout))
    optimizer, launched = Adafactor(params), []
    for p in params:
        p.grad = torch.empty(1).expand(p.shape)
    monkeypatch.setattr(torch.Tensor, "is_contiguous", lambda self, *args, **kwargs: True)
    monkeypatch.setattr(interpreter.InterpretedFunction, "run", lambda self, *a, **k: launched.append(self.fn.__name__))
    optimizer.step()
    print(f"\n{len(shapes)} tensors, {len(launched)} launches: {' '.join(launched)}")
    assert len(launched) <= 10
