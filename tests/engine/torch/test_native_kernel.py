"""The native kernels under the PyTorch optimizer: what the table of descriptors must notice."""

import os
import subprocess
import sys

import pytest
import torch
from native_support import need

from adafactor.core import native
from adafactor.torch import Adafactor


@pytest.fixture(autouse=True)
def _native():
    need(native.why_not())


def parameters(*shapes, dtype=torch.float32):
    torch.manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape).to(dtype)) for shape in shapes]


def step(optimizer, seed):
    generator = torch.Generator().manual_seed(seed)
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)
    optimizer.step()


def pair(*shapes, **options):
    """The same parameters under the native kernels and under torch operations."""
    return [Adafactor(parameters(*shapes), **options, fused=fused) for fused in (True, False)]


def assert_same(first, second, **tolerance):
    for a, b in zip(first.param_groups[0]["params"], second.param_groups[0]["params"], strict=True):
        torch.testing.assert_close(a, b, **tolerance)


def test_torchs_thread_setting_is_honoured(monkeypatch):
    threads = []
    monkeypatch.setattr(native.Table, "run", lambda table, verb, count, **_: threads.append(count))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        step(Adafactor(parameters((4, 4)), fused=True), 0)
    finally:
        torch.set_num_threads(before)
    assert threads == [1]


def test_autograd_notices_a_parameter_that_was_stepped():
    (p,) = parameters((3, 3))
    loss = (p * p).sum()
    p.grad = torch.ones(3, 3)
    Adafactor([p], fused=True).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_parameter_that_somebody_else_wrote_to_is_read_again():
    ours, theirs = pair((30, 40), (7,))
    for seed in range(4):
        step(ours, seed)
        step(theirs, seed)
        with torch.no_grad():
            for optimizer in (ours, theirs):
                for p in optimizer.param_groups[0]["params"]:
                    p.mul_(3)
    assert_same(ours, theirs, rtol=1e-5, atol=1e-5)


def test_a_parameter_with_new_memory_is_stepped_there():
    ours, theirs = pair((30, 40))
    for seed in range(4):
        step(ours, seed)
        step(theirs, seed)
        for optimizer in (ours, theirs):
            (p,) = optimizer.param_groups[0]["params"]
            p.data = p.data.clone()
    assert_same(ours, theirs, rtol=1e-5, atol=1e-6)


def test_a_list_that_changes_from_step_to_step():
    ours, theirs = pair((5, 6), (7,), (8, 3), (2, 2))
    for seed in range(12):
        for optimizer in (ours, theirs):
            generator = torch.Generator().manual_seed(seed)
            for number, p in enumerate(optimizer.param_groups[0]["params"]):
                g = torch.randn(p.shape, generator=generator)
                p.grad = None if (seed >> number) % 2 else g
            optimizer.step()
    assert_same(ours, theirs, rtol=1e-5, atol=1e-6)
    counts = [[int(o.state[p]["step"]) for p in o.param_groups[0]["params"]] for o in (ours, theirs)]
    assert counts[0] == counts[1]


def test_memory_formats_that_the_kernels_do_not_know_go_another_way():
    ours, theirs = pair((6, 5, 3, 3), (4, 4))
    for optimizer in (ours, theirs):
        p = optimizer.param_groups[0]["params"][0]
        p.data = p.data.to(memory_format=torch.channels_last)
    for seed in range(3):
        step(ours, seed)
        step(theirs, seed)
    assert_same(ours, theirs, rtol=1e-5, atol=1e-6)


def test_a_missing_library_is_a_slower_path_and_fused_says_why(monkeypatch):
    monkeypatch.setattr(native, "available", lambda: False)
    monkeypatch.setattr(native, "why_not", lambda: "The native kernels are not built.")
    step(Adafactor(parameters((4, 4))), 0)
    with pytest.raises(RuntimeError, match=r"^fused for cpu tensors must be None or False here, got True\. The native"):
        step(Adafactor(parameters((4, 4)), fused=True), 0)


FORK = """
import os, sys, torch
from adafactor.torch import Adafactor
# OpenMP's threads do not survive a fork: with two of them nothing but our step may ask for them in the child. Where
# there is one, ADAFACTOR_NUM_THREADS gives us two of our own.
torch.set_num_threads(int(sys.argv[1]))
torch.manual_seed(0)
params = [torch.nn.Parameter(torch.randn(300, 400)) for _ in range(8)]
optimizer = Adafactor(params, fused=True)
def train(steps):
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator)
        optimizer.step()
    return sum(p.detach().numpy().sum(dtype=float) for p in params)
train(3)
child = os.fork()
os.write(1, f"{train(5)}\\n".encode())  # in one piece: print may write a line in two, and both write at once
if child == 0:
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="Windows has no fork")
@pytest.mark.parametrize("threads", ["1", "2"])
def test_a_fork_in_the_middle_of_training_leaves_two_that_go_on(threads):
    environment = os.environ | {"ADAFACTOR_NUM_THREADS": "2"}
    command = [sys.executable, "-c", FORK, threads]
    outcome = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120, check=False)
    assert outcome.returncode == 0, outcome.stderr
    results = outcome.stdout.split()
    assert len(results) == 2, outcome
    assert results[0] == results[1]


@pytest.mark.skipif(sys.platform != "linux", reason="OpenMP elsewhere has another interface")
def test_pytorchs_threads_do_the_work(monkeypatch):
    """They are as many as asked for, so no thread of ours is started; and the bits are those of one thread."""
    monkeypatch.delenv("ADAFACTOR_NUM_THREADS", raising=False)
    results, before = [], torch.get_num_threads()
    for count in (1, 3):
        torch.set_num_threads(count)
        torch.ones(1 << 20).sum()  # PyTorch starts what it has
        alive = len(os.listdir("/proc/self/task"))
        optimizer = Adafactor(parameters((1000, 700), (300, 400), (5,)), fused=True)
        for seed in range(3):
            step(optimizer, seed)
        assert len(os.listdir("/proc/self/task")) <= alive
        results.append([p.detach().clone() for p in optimizer.param_groups[0]["params"]])
    torch.set_num_threads(before)
    assert all(map(torch.equal, *results))


WRITES = {
    "clamped": lambda p: p.data.clamp_(-0.01, 0.01),
    "scaled through NumPy": lambda p: p.detach().numpy().__imul__(0.1),
    "rows of unit norm": lambda p: p.data.div_(p.data.norm(dim=-1, keepdim=True)),
    "one element": lambda p: p.data.view(-1).__setitem__(0, 50.0),
    "zeroed": lambda p: p.data.zero_(),
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
@pytest.mark.parametrize("options", [{}, {"beta1": 0.9}, {"weight_decay": 0.1, "diagnostics": True}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_write_that_no_counter_counts_is_noticed(write, options, dtype):
    """Writes through ``.data`` leave the version counter alone; the scale is that of the weights that are there."""
    shapes = [(30, 40), (1500, 700), (9,), (3, 20, 30), (6, 4, 3, 3)]
    generator = torch.Generator().manual_seed(0)
    start = [torch.randn(s, generator=generator, dtype=dtype) for s in shapes]
    runs = []
    for fused in (None, False):
        params = [torch.nn.Parameter(x.clone()) for x in start]
        optimizer = Adafactor(params, lr=0.05, fused=fused, **options)
        generator = torch.Generator().manual_seed(1)
        for t in range(4):
            for p in params:
                p.grad = torch.randn(p.shape, generator=generator, dtype=dtype)
            optimizer.step()
            if t < 3:
                for p in params:
                    write(p)
        runs.append((params, optimizer))
    for k, (ours, theirs) in enumerate(zip(*(params for params, _ in runs), strict=True)):
        scale = float(theirs.detach().abs().max())
        torch.testing.assert_close(ours, theirs, rtol=0, atol=(1e-5 if dtype == torch.float32 else 1e-13) * scale)
        if options.get("diagnostics"):
            first, second = (o.diagnostics()[str(k)]["parameter_scale"] for _, o in runs)
            torch.testing.assert_close(first, second, rtol=1e-5, atol=0, check_dtype=False)


@pytest.mark.parametrize("rounding", [{"compensated": True}, {"stochastic_rounding": True, "seed": 3}], ids=str)
def test_a_write_that_no_counter_counts_is_noticed_in_bfloat16(rounding):
    start = torch.randn(400, 300, generator=torch.Generator().manual_seed(0)).bfloat16()
    moved = {}
    for known in (True, False):
        param = torch.nn.Parameter(start.clone())
        optimizer = Adafactor([param], lr=0.05, relative_step=False, **rounding)
        param.grad = torch.ones_like(param)
        optimizer.step()
        param.data.mul_(0.125)
        if not known:
            torch.autograd.graph.increment_version([param])
        before = param.detach().clone()
        optimizer.step()
        moved[known] = (param.detach().float() - before.float()).mean()
    torch.testing.assert_close(moved[True], moved[False], rtol=2e-2, atol=0)
