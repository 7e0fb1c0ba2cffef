"""Stochastic rounding: unbiased, counted, and the same for any block size."""

import numpy as np
import pytest
import torch

from adafactor.core import rounding
from adafactor.core.factoring import Part, layout
from adafactor.engine.torch import blocks
from adafactor.engine.torch.rounding import random_bits, row_major, stochastic_round
from adafactor.torch import Adafactor


@pytest.mark.parametrize("start", [0, 12345, (1 << 32) - 2])
def test_bits_are_the_ones_that_numpy_defines(start):
    seed, step, tensor = (3 << 32) + 9, 1001, 42
    index = np.arange(start, start + 100)
    expected = rounding.random_bits(seed, step, tensor, index).view(np.int32)
    bits = random_bits(seed, torch.tensor(step), tensor, torch.from_numpy(index))
    np.testing.assert_array_equal(bits.numpy(), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_rounding_is_the_one_that_numpy_defines(dtype):
    random = np.random.default_rng(0)
    x = random.integers(0, 1 << 32, 1 << 16, dtype=np.uint32).view(np.float32)  # every kind of number
    x = np.concatenate([x[np.isfinite(x)], random.normal(scale=2.0**-14, size=1 << 14).astype(np.float32)])
    bits = random.integers(0, 1 << 32, len(x), dtype=np.uint32)
    defined = rounding.bfloat16 if dtype == torch.bfloat16 else rounding.float16
    rounded = stochastic_round(torch.from_numpy(x), dtype, torch.from_numpy(bits.view(np.int32)))
    np.testing.assert_array_equal(rounded.view(torch.int16).numpy().view(np.uint16), defined(x, bits))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_native_and_torch_kernels_round_alike(dtype):
    start, gradient = torch.randn(6, 50).to(dtype), torch.randn(6, 50).to(dtype)
    results = []
    for fused in (True, False):
        param = torch.nn.Parameter(start.clone())
        param.grad = gradient
        # One step so large that a last bit of difference in it is far below what is rounded away.
        Adafactor([param], lr=1e-2, stochastic_rounding=True, fused=fused, seed=5).step()
        results.append(param.detach())
    assert (results[0] != results[1]).float().mean() < 0.01


def test_every_argument_changes_the_bits():
    index = torch.arange(1000)
    base = random_bits(0, torch.tensor(1), 0, index)
    for other in (
        random_bits(1, torch.tensor(1), 0, index),
        random_bits(1 << 32, torch.tensor(1), 0, index),
        random_bits(0, torch.tensor(2), 0, index),
        random_bits(0, torch.tensor(1), 1, index),
        random_bits(0, torch.tensor(1), 0, index + 1000),
    ):
        assert (base == other).sum() <= 1
    ones = sum(((base >> bit) & 1).sum().item() for bit in range(32))
    assert ones / 32000 == pytest.approx(0.5, abs=0.02)


def test_row_major_places():
    shape = (3, 4, 5)
    block = (slice(1, 3), slice(None), slice(2, 5))
    places = torch.arange(60).view(shape)[block]
    assert torch.equal(row_major(layout(shape), block, torch.device("cpu")), places)
    assert row_major(layout(()), (), torch.device("cpu")).item() == 0
    part = Part((2, 4, 3), (1,), (2,), (), shape, (1, 0, 2))
    assert torch.equal(row_major(part, None, torch.device("cpu")), places)
    assert torch.equal(row_major(part, (slice(1, 2),) * 3, torch.device("cpu")), places[1:2, 1:2, 1:2])


VALUES = [1.0, -1.0, 0.02003, -0.02003, 1e-7, -3.3e-6, 6.1e-5, 0.3333, 123.456, -999.9]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("value", VALUES)
def test_a_neighbour_with_the_right_probability(dtype, value):
    n = 1 << 16
    x = torch.full((n,), value)
    rounded = stochastic_round(x, dtype, random_bits(0, torch.tensor(1), 0, torch.arange(n))).double()
    found = rounded.unique()
    assert len(found) <= 2
    assert found[0] <= x[0].double() <= found[-1]
    gap = (found[-1] - found[0]).item()
    # Four standard deviations of a mean of n draws between two neighbours.
    assert rounded.mean().item() == pytest.approx(x[0].item(), abs=4 * gap / 2 / n**0.5 + 1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_what_needs_no_rounding_stays(dtype):
    values = torch.tensor([0.0, -0.0, 1.5, -2.0, float("inf"), -float("inf"), 2.0**-24, 2.0**-14, float("nan")])
    bits = random_bits(0, torch.tensor(1), 0, torch.arange(len(values)))
    rounded = stochastic_round(values, dtype, bits)
    torch.testing.assert_close(rounded.float(), values, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(torch.signbit(rounded[:2]), torch.tensor([False, True]))


@pytest.mark.parametrize("limit", [5, 64])
def test_block_size_and_strides_do_not_matter(limit, monkeypatch):
    gradient = torch.randn(12, 10).bfloat16()
    start = torch.randn(12, 10).bfloat16()
    results = []
    for limit_, strided in ((1 << 20, False), (limit, False), (limit, True)):
        monkeypatch.setattr(blocks, "CPU_BLOCK", limit_)
        param = torch.nn.Parameter(start.t().contiguous().t() if strided else start.clone())
        # One number per row and none to add up over blocks: the update has the same bits, so only the draw differs.
        optimizer = Adafactor(
            [param], lr=1e-3, stochastic_rounding=True, relative_step=False, scale_parameter=False, d=None,
            min_dim_size_to_factor=11, fused=False, seed=0,
        )  # fmt: skip
        param.grad = gradient.clone()
        optimizer.step()
        results.append(param.detach())
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_small_steps_add_up():
    """lr 1e-5 on N(0, 0.02²) weights, 200 steps of one sign: rounding to nearest loses most of them."""
    start = (0.02 * torch.randn(256, 128)).bfloat16()
    gradient = torch.ones(256, 128)
    displacement, unmoved = {}, {}
    for name, dtype, stochastic in (
        ("float32", torch.float32, False),
        ("stochastic", torch.bfloat16, True),
        ("nearest", torch.bfloat16, False),
    ):
        param = torch.nn.Parameter(start.to(dtype, copy=True))
        optimizer = Adafactor(
            [param], lr=1e-5, relative_step=False, scale_parameter=False, stochastic_rounding=stochastic
        )
        for _ in range(200):
            param.grad = gradient.to(dtype)
            optimizer.step()
        moved = param.detach().double() - start.double()
        displacement[name], unmoved[name] = moved.mean().item(), (moved == 0).double().mean().item()
    assert displacement["float32"] == pytest.approx(-2e-3, rel=1e-3)
    assert displacement["stochastic"] == pytest.approx(displacement["float32"], rel=0.02)
    assert unmoved["nearest"] > 0.5
