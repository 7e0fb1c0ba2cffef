"""Momentum in 8 bits: how far the stored number is off, without bias, and it travels like every other state."""

import copy
import math
import pickle

import pytest
import torch
from torch_support import parameters, step, train

from adafactor.engine.torch import blocks, int8
from adafactor.engine.torch.rounding import random_bits
from adafactor.torch import Adafactor

OPTIONS = {"beta1": 0.9, "momentum_dtype": torch.int8, "seed": 0}


def draws(count, seed=0):
    return random_bits(seed, torch.tensor(1), 0, torch.arange(count))


def bound(m, s):
    return s * (2 * (m.abs() / s).sqrt() / int8.LARGEST + 1 / int8.LARGEST**2)


@pytest.mark.parametrize("size", [1, 255, 256, 257, 5000])
def test_the_error_is_within_the_bound_of_the_docstring(size):
    m = torch.randn(size) * torch.logspace(-6, 3, size)
    for bits, share in ((draws(size), 1.0), (None, 0.5)):
        codes, scale = int8.encode(m, bits)
        assert (codes.shape, scale.shape) == (m.shape, (math.ceil(size / 256),))
        s = scale.repeat_interleave(256)[:size]
        assert ((int8.decode(codes, scale) - m).abs() <= share * bound(m, s) * (1 + 1e-5) + 1e-6 * s).all()
        assert torch.equal(codes.sign() * (codes != 0), m.sign().to(torch.int8) * (codes != 0))


def test_the_error_is_not_within_half_the_bound():
    m = torch.randn(5000)
    codes, scale = int8.encode(m, draws(5000))
    assert ((int8.decode(codes, scale) - m).abs() > 0.5 * bound(m, scale.repeat_interleave(256)[:5000])).any()


def test_zeros_and_the_largest_of_a_block_are_exact():
    m = torch.zeros(512)
    m[300] = -3.7
    codes, scale = int8.encode(m, draws(512))
    assert scale.tolist() == pytest.approx([0.0, 3.7])
    torch.testing.assert_close(int8.decode(codes, scale), m, rtol=1e-6, atol=0)


def test_what_is_not_finite_makes_its_block_nan():
    m = torch.ones(512)
    m[0] = math.inf
    codes, scale = int8.encode(m)
    decoded = int8.decode(codes, scale)
    assert decoded[:256].isnan().all()
    assert (decoded[256:] == 1).all()


def test_rounding_keeps_the_mean():
    m = torch.linspace(-1, 1, 256)
    mean = torch.stack([int8.decode(*int8.encode(m, draws(256, seed))) for seed in range(2000)]).mean(0)
    # Five standard deviations of a mean of 2000 draws between two neighbours.
    assert ((mean - m).abs() <= 5 * bound(m, torch.tensor(1.0)) / 2 / 2000**0.5).all()


def test_a_slow_average_moves():
    """Rounded to nearest it would stand still: the reason for random bits."""
    start, target = 0.5 * torch.randn(1024), torch.randn(1024)
    errors = {}
    for kind in ("drawn", "nearest"):
        codes, scale = int8.encode(start)
        exact = int8.decode(codes, scale)
        for t in range(500):
            exact = 0.99 * exact + 0.01 * target
            m = 0.99 * int8.decode(codes, scale) + 0.01 * target
            codes, scale = int8.encode(m, draws(1024, t) if kind == "drawn" else None)
        errors[kind] = (
            (int8.decode(codes, scale) - exact).square().mean().sqrt() / exact.square().mean().sqrt()
        ).item()
    assert errors["drawn"] < 0.03
    assert errors["nearest"] > 0.2


def test_slabs_cover_a_shape_and_begin_with_blocks():
    for shape in [(), (1,), (700,), (3, 300), (5, 256), (4, 7, 128), (1, 2, 2048), (2, 1 << 12), (3, 5, 7)]:
        for limit in (1, 300, 1000, 1 << 20):
            places = torch.arange(math.prod(shape)).view(shape)
            found = [places[piece].reshape(-1) for piece in int8.slabs(shape, limit)]
            assert torch.equal(torch.cat(found), places.reshape(-1))
            assert all(int(piece[0]) % 256 == 0 for piece in found)


@pytest.mark.parametrize("limit", [256, 1000])
def test_block_size_does_not_matter(limit, monkeypatch):
    results = []
    for size in (1 << 20, limit):
        monkeypatch.setattr(blocks, "CPU_BLOCK", size)
        params = parameters([(12, 100), (3, 7, 64), (900,)])
        # Without sums over blocks, the update has the same bits.
        optimizer = Adafactor(params, factoring=lambda name, shape: None, d=None, scale_parameter=False, **OPTIONS)
        train(optimizer, 3)
        results.append([optimizer.state[p] for p in params])
    for one, other in zip(*results, strict=True):
        assert torch.equal(one["momentum"], other["momentum"])
        assert torch.equal(one["momentum_scale"], other["momentum_scale"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_it_trains_like_float32_momentum(dtype):
    ends = []
    for momentum_dtype in (torch.int8, torch.float32):
        params = parameters([(40, 30), (30,)], dtype)
        optimizer = Adafactor(params, lr=1e-2, beta1=0.9, momentum_dtype=momentum_dtype, seed=0)
        train(optimizer, 20)
        ends.append(torch.cat([(p.detach() - q).flatten() for p, q in zip(params, parameters([(40, 30), (30,)], dtype),
                               strict=True)]).double())  # fmt: skip
        if momentum_dtype == torch.int8:
            state = optimizer.state[params[0]]
            assert (state["momentum"].dtype, state["momentum_scale"].dtype) == (torch.int8, torch.float32)
            assert state["momentum_scale"].shape == (5,)
    assert (ends[0] - ends[1]).norm() < 0.05 * ends[1].norm()


def test_memory_formats_and_skipped_gradients():
    params = [torch.nn.Parameter(torch.randn(6, 5, 3, 3).to(memory_format=torch.channels_last))]
    optimizer = Adafactor(params, **OPTIONS)
    train(optimizer, 2)
    state = copy.deepcopy(optimizer.state[params[0]])
    assert state["momentum"].is_contiguous()
    params[0].grad = torch.full_like(params[0], math.nan)
    optimizer.step()
    assert optimizer.skipped == 1
    assert all(torch.equal(value, optimizer.state[params[0]][name]) for name, value in state.items())


def copies(optimizer):
    loaded = Adafactor(copy.deepcopy(optimizer.param_groups[0]["params"]), **OPTIONS)
    loaded.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    return [loaded, copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_resumed_run_is_bit_for_bit_the_same(dtype):
    optimizer = Adafactor(parameters([(12, 100), (7,)], dtype), **OPTIONS)
    train(optimizer, 3)
    others = copies(optimizer)
    for other in (optimizer, *others):
        for seed in range(2):
            step(other, seed)
    for other in others:
        for p, q in zip(optimizer.param_groups[0]["params"], other.param_groups[0]["params"], strict=True):
            assert torch.equal(p, q)
            for name, value in optimizer.state[p].items():
                assert torch.equal(value, other.state[q][name])
                assert value.dtype == other.state[q][name].dtype


def test_momentum_of_other_optimizers_is_coded_and_ours_decoded():
    params = parameters([(12, 100)])
    floats = Adafactor(params, beta1=0.9)
    train(floats, 3)
    exact = floats.state[params[0]]["momentum"]
    state = copy.deepcopy(floats.state_dict())
    state["param_groups"][0]["momentum_dtype"] = torch.int8
    coded = Adafactor(parameters([(12, 100)]), **OPTIONS)
    coded.load_state_dict(state)
    found = coded.state[coded.param_groups[0]["params"][0]]
    scale = found["momentum_scale"].repeat_interleave(256)[:1200].view(12, 100)
    assert ((int8.decode(found["momentum"], found["momentum_scale"]) - exact).abs() <= bound(exact, scale)).all()
    state = copy.deepcopy(coded.state_dict())
    state["param_groups"][0]["momentum_dtype"] = torch.float32
    floats.load_state_dict(state)
    decoded = floats.state[params[0]]
    assert torch.equal(decoded["momentum"], int8.decode(found["momentum"], found["momentum_scale"]))
    assert "momentum_scale" not in decoded
    del state["state"][0]["momentum_scale"]
    with pytest.raises(
        ValueError, match=r"^momentum_scale of parameter 0 must be there beside 8-bit momentum, got 'none'"
    ):
        coded.load_state_dict(state)


def test_under_torch_compile():
    ours, theirs = (Adafactor(parameters([(6, 20), (300,)]), **OPTIONS) for _ in range(2))
    compiled = torch.compile(lambda: ours.step(), fullgraph=True, backend="aot_eager")
    for seed in range(2):
        step(theirs, seed)
        generator = torch.Generator().manual_seed(seed)
        for p in ours.param_groups[0]["params"]:
            p.grad = torch.randn(p.shape, generator=generator)
        compiled()
    for p, q in zip(ours.param_groups[0]["params"], theirs.param_groups[0]["params"], strict=True):
        assert torch.equal(p, q)
        assert torch.equal(ours.state[p]["momentum"], theirs.state[q]["momentum"])


def test_sharded_parameters_are_refused_before_anything_is_written(tmp_path):
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    try:
        sharded = torch.nn.Parameter(distribute_tensor(torch.ones(4, 4), init_device_mesh("cpu", (1,)), [Shard(0)]))
        plain = torch.nn.Parameter(torch.ones(3, 3))
        sharded.grad, plain.grad = torch.ones_like(sharded), torch.ones_like(plain)
        with pytest.raises(
            RuntimeError, match=r"^momentum_dtype of a DTensor must be a float dtype, got torch\.int8\."
        ):
            Adafactor([plain, sharded], **OPTIONS).step()
        assert (plain == 1).all()
    finally:
        dist.destroy_process_group()
