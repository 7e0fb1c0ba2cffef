"""The Triton kernels: the same code that launches on a GPU, here in Triton's interpreter where there is none.

``python -m pytest tests/engine/torch/test_triton.py -s`` prints how many parameters were compared and the worst error.
"""

import copy
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch
from torch_support import follow, parameters, step, train, words
from trajectories import LAYOUTS, OPTIONS, Trajectory
from triton_support import DEVICE, use

from adafactor import Factored
from adafactor.core import rounding
from adafactor.engine.torch import cuda
from adafactor.engine.torch import rounding as torch_rounding
from adafactor.engine.torch.triton import table
from adafactor.torch import Adafactor

pytest.importorskip("triton")

SHAPES = [(), (7,), (600,), (5, 3), (1, 6), (17, 40), (4, 3, 3), (3, 300)]
compared: dict[str, list[float]] = defaultdict(list)


@pytest.fixture(scope="module", autouse=True)
def _report():
    yield
    for dtype, errors in compared.items():
        print(f"\n{dtype}: {len(errors)} parameters beside the reference, at most {max(errors):.0%} of what is allowed")


@pytest.fixture
def kernel(monkeypatch):
    return use(monkeypatch)


def compare(shapes, dtype, options, steps=3, groups=None):
    """One optimizer over parameters of these shapes, each with its group's options as well."""
    groups = groups or [{}] * len(shapes)
    trajectories = [Trajectory("triton", x, dtype, options | own) for x, own in zip(shapes, groups, strict=True)]
    optimizer = follow(trajectories, steps, groups, {"device": DEVICE}, **words(options))
    compared[dtype] += [one.worst for one in trajectories]
    assert optimizer.skipped == 0


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_options(kernel, options):
    compare([(7,), (5, 3), (17, 40), (4, 3, 3)] if options else SHAPES, "float32", options)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("options", [{}, {"beta_1": 0.9, "weight_decay": 0.1}], ids=["default", "momentum"])
def test_storage_dtypes(kernel, dtype, options):
    compare(SHAPES, dtype, options, steps=2)


@pytest.mark.parametrize("on_chip", [0, table.ON_CHIP])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_tiles_of_the_size_that_a_device_gets(monkeypatch, dtype, on_chip):
    use(monkeypatch, small=False)
    monkeypatch.setattr(table, "ON_CHIP", on_chip)
    more = [(6, 1), (3, 16), (2, 1, 3, 2, 4), (5, 5000), (300, 20), (70, 3, 3)]
    compare([*SHAPES, *more], dtype, {}, steps=2)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_layouts(kernel, dtype):
    groups = [{"factoring": factoring} for factoring in LAYOUTS.values()]
    compare([(2, 3, 4, 5)] * len(groups), dtype, {"weight_decay": 0.01}, steps=2, groups=groups)


def pair(shapes, dtype=torch.float32, **options):
    """The same parameters under Triton kernels and under torch operations."""
    both = []
    for fused in (None, False):
        params = [torch.nn.Parameter(p.detach().to(DEVICE)) for p in parameters(shapes, dtype)]
        both.append(Adafactor(params, fused=fused, **options))
    return both


def assert_same(first, second, rtol=1e-5, atol=1e-6):
    for a, b in zip(first.param_groups[0]["params"], second.param_groups[0]["params"], strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=atol)
        assert first.state[a].keys() == second.state[b].keys()
        for name, value in first.state[a].items():
            if value.dtype != torch.int8:
                torch.testing.assert_close(value, second.state[b][name], rtol=rtol, atol=atol)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_stochastic_rounding_draws_the_same(kernel, dtype):
    ours, theirs = pair([(6, 50), (300,), (40, 3, 3)], dtype, stochastic_rounding=True, seed=(5 << 40) + 1)
    step(ours)
    step(theirs)
    for a, b in zip(ours.param_groups[0]["params"], theirs.param_groups[0]["params"], strict=True):
        assert (a != b).float().mean() < 0.02


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_rounding_is_the_one_that_numpy_defines(kernel, dtype):
    """A parameter with no gradient to speak of: what is added is 0, and what is stored is the draw alone."""
    x = torch.tensor(np.random.default_rng(0).normal(scale=2.0**-13, size=600)).to(dtype)
    keep = 0.75  # takes every x off the numbers that the dtype has
    param = torch.nn.Parameter(x.to(DEVICE, copy=True))
    param.grad = torch.zeros_like(param)
    optimizer = Adafactor([param], lr=0.25, weight_decay=1.0, stochastic_rounding=True, seed=9, relative_step=False)
    optimizer.step()
    bits = rounding.random_bits(9, 1, 0, np.arange(600))
    defined = rounding.bfloat16 if dtype == torch.bfloat16 else rounding.float16
    expected = defined((keep * x.float()).numpy(), bits)
    np.testing.assert_array_equal(param.detach().cpu().view(torch.int16).numpy().view(np.uint16), expected)


def test_random_bits_beyond_the_first_four_billion_elements():
    from triton_bits import kernel

    for start in (0, (1 << 32) - 5):
        out = torch.zeros(16, dtype=torch.int32, device=DEVICE)
        kernel[(1,)](out, start, BLOCK=16)
        index = torch.arange(start, start + 16)
        assert torch.equal(out.cpu(), torch_rounding.random_bits(77, torch.tensor(3), 3, index))


@pytest.mark.parametrize("poison", [float("nan"), 1e30])
def test_a_gradient_that_is_not_finite(kernel, poison):
    batched = [{"params": parameters([(3, 4, 5)])[0].to(DEVICE).detach().requires_grad_(),
                "factoring": lambda name, shape: Factored((1,), (2,), (0,))}]  # fmt: skip
    plain = [torch.nn.Parameter(p.detach().to(DEVICE)) for p in parameters([(30, 40), (600,), (3, 300), (5, 3)])]
    optimizer = Adafactor([{"params": plain}, *batched], beta1=0.9, weight_decay=0.1)
    params = [*plain, batched[0]["params"][0]]
    train(optimizer, 2)
    before = [copy.deepcopy((p.detach(), optimizer.state[p])) for p in params]
    for p in params:
        p.grad = torch.ones_like(p)
    for k in (0, 1, 2, 4):
        params[k].grad.view(-1)[-1] = poison
    optimizer.step()
    assert optimizer.skipped == 4
    for k, (p, (x, state)) in enumerate(zip(params, before, strict=True)):
        assert torch.equal(p, x) == (k != 3)
        for name, value in state.items():
            assert torch.equal(optimizer.state[p][name], value) == (k != 3), name
    optimizer.param_groups[0]["skip_nonfinite"] = False
    optimizer.step()
    assert optimizer.skipped == 5
    assert not params[0].isfinite().all()


def test_what_changes_between_steps_is_noticed(kernel):
    """Learning rates, gradients' addresses and dtypes, the list, memory, and settings."""
    ours, theirs = pair([(30, 40), (7,), (8, 3)])
    for seed in range(8):  # a change per step
        for optimizer in (ours, theirs):
            generator = torch.Generator().manual_seed(seed)
            group = optimizer.param_groups[0]
            for number, p in enumerate(group["params"]):
                g = torch.randn(p.shape, generator=generator).to(DEVICE)
                p.grad = None if seed == 3 and number == 1 else g
            group["lr"] = 1e-2 / (seed + 1) if seed < 5 else torch.tensor(1e-2 * seed, device=DEVICE)
            if seed == 2:
                group["params"][0].data = group["params"][0].data.clone()
            if seed == 4:
                group["maximize"] = True
            if seed == 6:
                optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
            optimizer.step()
    assert_same(ours, theirs)


def test_gradients_of_other_dtypes_and_strides(kernel):
    ours, theirs = pair([(6, 20), (20, 6)])
    for optimizer in (ours, theirs):
        first, second = optimizer.param_groups[0]["params"]
        first.grad_dtype = None
        first.grad = torch.linspace(-1, 1, 120, device=DEVICE).view(6, 20).bfloat16()
        second.grad = torch.linspace(-1, 1, 120, device=DEVICE).view(6, 20).t()
        optimizer.step()
    assert_same(ours, theirs)


def test_gradients_that_are_no_multiples_of_16_bytes_apart(kernel):
    ours, theirs = pair([(4, 32), (64,)])
    for optimizer in (ours, theirs):
        for p in optimizer.param_groups[0]["params"]:
            bucket = torch.linspace(-1, 1, p.numel() + 1, device=DEVICE)
            p.grad = bucket[1:].view_as(p)
        optimizer.step()
    assert_same(ours, theirs)


def test_alignment_is_a_property_of_a_tensor(kernel, monkeypatch):
    params = [torch.nn.Parameter(torch.ones(64, 64, device=DEVICE)) for _ in range(3)]
    optimizer = Adafactor(params)
    bucket = torch.ones(64 * 64 + 1, device=DEVICE)
    for grads in ([torch.ones(64, 64, device=DEVICE)] * 3, [bucket[1:].view(64, 64)] + [torch.ones(64, 64)] * 2):
        for p, g in zip(params, grads, strict=True):
            p.grad = g.to(DEVICE)
        optimizer.step()
    (prepared,) = optimizer._preparation._prepared.values()
    ((backend, _),) = prepared.plan.backends
    read = {launch.aligned: {int(k) for k in blocks[:, 0]} for launch, blocks in backend.tables.plan.measure.items()}
    assert read == {False: {0}, True: {1, 2}}
    for p in params[1:]:
        torch.testing.assert_close(params[0], p, rtol=1e-6, atol=0)


def test_what_the_kernels_do_not_know_goes_another_way(kernel):
    ours, theirs = pair([(6, 5, 3, 3), (4, 4)])
    for optimizer in (ours, theirs):
        p = optimizer.param_groups[0]["params"][0]
        p.data = p.data.to(memory_format=torch.channels_last)
        double = torch.nn.Parameter(torch.ones(3, 4, dtype=torch.float64, device=DEVICE))
        optimizer.add_param_group({"params": [double]})
        train(optimizer, 2)
    assert_same(ours, theirs)
    assert ours.state[ours.param_groups[1]["params"][0]]["row"].dtype == torch.float64


@pytest.mark.parametrize("on_chip", [64, 16384])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8], ids=str)
def test_momentum_dtypes(kernel, monkeypatch, dtype, on_chip):
    """8-bit: rows of whole blocks, rows that blocks cross, and slices that blocks cross."""
    monkeypatch.setattr(table, "ON_CHIP", on_chip)
    shapes = [(3, 256), (2, 512), (20, 30), (40, 16), (700,), (9, 3, 3)]
    ours, theirs = pair(shapes, beta1=0.9, momentum_dtype=dtype, weight_decay=0.01, seed=0)
    for optimizer in (ours, theirs):
        sliced = torch.nn.Parameter(torch.ones(3, 100, device=DEVICE))
        optimizer.add_param_group({"params": [sliced], "factoring": lambda name, shape: Factored(batch=(0,))})
    for seed in range(2):
        for optimizer in (ours, theirs):
            step(optimizer, seed)
    for group, other in zip(ours.param_groups, theirs.param_groups, strict=True):
        for a, b in zip(group["params"], other["params"], strict=True):
            first, second = ours.state[a]["momentum"], theirs.state[b]["momentum"]
            torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-5)
            if dtype == torch.int8:  # a last bit of difference may lie on the other side of a draw
                assert ((first.int() - second.int()).abs() <= 1).all()
                assert (first != second).float().mean() < 0.01
                assert first.any()
                scales = (optimizer.state[p]["momentum_scale"] for optimizer, p in ((ours, a), (theirs, b)))
                torch.testing.assert_close(*scales, rtol=1e-4, atol=1e-6)
    (prepared,) = ours._preparation._prepared.values()
    held = {int(k) for (backend, _) in prepared.plan.backends for b in backend.tables.on_chip.values() for k in b[:, 0]}
    alone = {0, 1, 3, 4} if dtype == torch.int8 else {0, 1, 2, 3, 4}
    assert held == (alone if on_chip > 64 else set())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_compensated(kernel, dtype):
    ours, theirs = pair([(6, 50), (300,), (9, 3, 3), (2, 300)], dtype, compensated=True, lr=1e-3, weight_decay=0.1)
    for seed in range(3):
        step(ours, seed)
        step(theirs, seed)
    for a, b in zip(ours.param_groups[0]["params"], theirs.param_groups[0]["params"], strict=True):
        one, other = (o.state[p]["residual"] for o, p in ((ours, a), (theirs, b)))
        assert one.any()
        total, expected = a.detach().double() + one.double(), b.detach().double() + other.double()
        torch.testing.assert_close(total, expected, rtol=2e-5, atol=1e-6)
        assert ((a == b) & (one == other)).float().mean() > 0.95  # a last bit of difference may tip a tie


@pytest.mark.parametrize("options", [{}, {"d": None, "scale_parameter": False}], ids=str)
def test_diagnostics(kernel, options):
    ours, theirs = pair([(6, 50), (300,)], diagnostics=True, weight_decay=0.1, **options)
    for optimizer in (ours, theirs):
        sliced = torch.nn.Parameter(torch.ones(3, 4, 5, device=DEVICE))
        optimizer.add_param_group({"params": [sliced], "factoring": lambda name, shape: Factored((1,), (2,), (0,))})
        step(optimizer)
        optimizer.param_groups[0]["params"][0].grad[0, 0] = float("nan")
        optimizer.step()
    found, expected = ours.diagnostics(), theirs.diagnostics()
    for name, values in expected.items():
        for what, value in values.items():
            torch.testing.assert_close(found[name][what], value, rtol=2e-6, atol=0)
    assert int(found["0"]["skipped"]) == 1


def test_int8_momentum_that_is_not_finite(kernel):
    (p,) = (torch.nn.Parameter(q.detach().to(DEVICE)) for q in parameters([(2, 256)]))
    optimizer = Adafactor([p], beta1=0.9, momentum_dtype=torch.int8, skip_nonfinite=False, d=None)
    step(optimizer)
    p.grad[0, 0] = float("nan")
    optimizer.step()
    assert optimizer.state[p]["momentum_scale"].isnan().any()


@pytest.mark.parametrize("bits", [0, 0xFFFF])
def test_int8_momentum_keeps_the_sign_of_the_largest(kernel, monkeypatch, bits):
    """A device divides by an approximate reciprocal, so the largest number over itself may be a last place above 1."""
    if DEVICE.type == "cpu":
        from triton.runtime.interpreter import InterpreterBuilder

        def divide(self, x, y):
            reciprocal = np.nextafter(np.float32(1) / y.data, np.float32(np.inf), dtype=np.float32)
            return type(x)((x.data * reciprocal).astype(np.float32), x.dtype.scalar)

        monkeypatch.setattr(InterpreterBuilder, "create_fdiv", divide)
    from triton_code import kernel as code

    values = torch.linspace(1, 2, 4096, device=DEVICE).view(16, 256)
    values = torch.where(torch.arange(256, device=DEVICE) % 2 == 1, values, -values)  # the largest is positive
    codes = torch.zeros(16, 256, dtype=torch.int8, device=DEVICE)
    scales = torch.zeros(16, device=DEVICE)
    code[(1,)](values, codes, scales, bits, SIZE=4096)
    assert torch.equal(codes.sign(), values.sign().to(torch.int8))
    assert (codes.amax(dim=1) == 127).all()


def test_resuming_is_bit_for_bit(kernel):
    options = {"beta1": 0.9, "momentum_dtype": torch.int8, "stochastic_rounding": True, "seed": 0}
    run = [Adafactor([torch.nn.Parameter(p.detach().to(DEVICE)) for p in parameters([(2, 256), (5, 7)],
           torch.bfloat16)], **options) for _ in range(2)]  # fmt: skip
    for seed in range(4):
        step(run[0], seed)
    for seed in range(2):
        step(run[1], seed)
    resumed = Adafactor(run[1].param_groups[0]["params"], **options)
    resumed.load_state_dict(copy.deepcopy(run[1].state_dict()))
    for seed in range(2, 4):
        step(resumed, seed)
    for a, b in zip(run[0].param_groups[0]["params"], resumed.param_groups[0]["params"], strict=True):
        assert torch.equal(a, b)
        assert torch.equal(run[0].state[a]["momentum"], resumed.state[b]["momentum"])


def test_a_compiled_step_goes_to_the_same_kernels(kernel):
    ours, theirs = pair([(6, 20), (5,)], beta1=0.9)
    compiled = torch.compile(lambda: ours.step(), fullgraph=True, backend="aot_eager")
    for seed in range(2):
        step(theirs, seed)
        generator = torch.Generator().manual_seed(seed)
        for p in ours.param_groups[0]["params"]:
            p.grad = torch.randn(p.shape, generator=generator).to(DEVICE)
        compiled()
    assert_same(ours, theirs)


def launches(optimizer, monkeypatch):
    """How many kernels one step launches, by name."""
    from adafactor.engine.torch.triton import kernels

    counted = []
    cls = type(kernels.apply)
    run = cls.run

    def count(self, *args, **kwargs):
        counted.append(self)
        return run(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(cls, "run", count)
        step(optimizer)
    return len(counted)


def test_launches_do_not_grow_with_the_number_of_tensors(kernel, monkeypatch):
    few, many = (
        Adafactor([torch.nn.Parameter(p.detach().to(DEVICE)) for p in parameters([(4, 16), (16, 4), (5,)] * times)])
        for times in (1, 10)
    )
    assert launches(few, monkeypatch) == launches(many, monkeypatch) <= 12


def test_launches_are_put_together_anew_only_where_something_has_changed(kernel, monkeypatch):
    (few,), (many,) = ([torch.nn.Parameter(torch.ones(n, 4, device=DEVICE))] for n in (8, 64))
    optimizer, other = Adafactor([few], lr=0.1), Adafactor([many])
    made = []
    init = cuda.Launches.__init__
    monkeypatch.setattr(cuda.Launches, "__init__", lambda self, *args: [made.append(self), init(self, *args)][0])

    def put_together(optimizer):
        before = len(made)
        step(optimizer)
        return len(made) - before

    assert [put_together(optimizer) for _ in range(4)] == [1, 1, 0, 0]  # the second step knows its Σx²
    optimizer.param_groups[0]["lr"] = 0.2  # is data
    assert put_together(optimizer) == 0
    assert put_together(other) == 1
    assert put_together(optimizer) == 1  # in the other's larger buffer
    assert put_together(optimizer) == 0
    optimizer.param_groups[0]["weight_decay"] = 0.1
    assert put_together(optimizer) == 1


@pytest.mark.parametrize("whose", ["nvidia", "amd"])
def test_every_kernel_compiles(tmp_path, whose):
    """What steps launch, compiled for H100, or for MI300 and Radeon; no device is needed."""
    helper = Path(__file__).parents[2] / "helpers" / "triton_compile.py"
    environment = {"TRITON_CACHE_DIR": str(tmp_path), "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}
    command = [sys.executable, str(helper), whose]
    outcome = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False)
    assert outcome.returncode == 0, outcome.stdout[-2000:] + outcome.stderr[-4000:]
    assert outcome.stdout.count(" shared") >= 30, outcome.stdout
