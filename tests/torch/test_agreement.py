"""The torch kernel against the oracle: `reference.py` in float64, over shapes, dtypes, layouts and options."""

import numpy as np
import pytest
import torch
from torch_oracle import LAYOUTS, OPTIONS, oracle, reference_step

from adafactor.engine.torch import blocks
from adafactor.torch import Adafactor

SHAPES = [(), (1,), (7,), (5, 3), (1, 6), (6, 1), (2, 4, 3), (3, 3, 4, 5), (2, 1, 3, 2, 4)]
# Relative to the largest element of the parameter; 30 steps of float32 arithmetic, or one rounding to the dtype.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 2e-6}


def run(shape: tuple[int, ...], dtype: torch.dtype, options: dict, steps: int = 10, **tensor_options) -> None:
    ours, options_ = oracle(shape, options)
    rng = np.random.default_rng(0)
    # Rows and columns of very different size, and a column without gradient.
    scale = np.exp(rng.normal(size=shape) * 0.1)
    for axis, n in enumerate(shape):
        spread = np.exp((1 if dtype == torch.float16 else 3) * rng.normal(size=n))
        scale = scale * np.expand_dims(spread, [a for a in range(len(shape)) if a != axis])
    if len(shape) >= 2 and shape[-1] > 2:
        scale[..., 1] = 0
    start = torch.from_numpy(np.asarray(rng.normal(size=shape))).to(dtype)
    param = torch.nn.Parameter(start.clone(**tensor_options))
    optimizer = Adafactor([param], **options)
    x = start.double().numpy()
    for _ in range(steps):
        g = torch.from_numpy(np.asarray(rng.normal(size=shape) * scale)).to(dtype)
        param.grad = g.clone(**tensor_options)
        optimizer.step()
        x = reference_step(ours, options_, x, g.double().numpy())
        largest = max(np.abs(x).max(), 1e-30)
        if dtype in TOLERANCE:
            assert np.abs(param.detach().double().numpy() - x).max() <= TOLERANCE[dtype] * largest
        else:  # one rounding to nearest per step, and the next step starts from what was stored
            digits = torch.finfo(dtype).eps
            error = np.abs(param.detach().double().numpy() - x)
            assert (error <= 0.5001 * digits * np.abs(x) + 1e-6 * largest).all()
            x = param.detach().double().numpy()
    state = optimizer.state[param]
    assert int(state["step"]) == ours.state.t
    for name, value in ours.state.second_moment.items():
        assert state[name].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        np.testing.assert_allclose(state[name].numpy(), value, rtol=3e-6 if dtype != torch.float64 else 1e-12)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_shapes_and_dtypes(shape, dtype):
    run(shape, dtype, {})


@pytest.mark.parametrize("shape", [(7,), (5, 3), (2, 4, 3)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_options(shape, dtype, options):
    run(shape, dtype, options)


@pytest.mark.parametrize("factoring", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_layouts(factoring, dtype):
    run((2, 3, 4, 5), dtype, {"factoring": factoring, "weight_decay": 0.01})


@pytest.mark.parametrize("limit", [1, 3, 7, 20, 64])
@pytest.mark.parametrize("factoring", ["last_two", *LAYOUTS.values()], ids=["last_two", *LAYOUTS])
def test_blocks_of_any_size_give_the_same(factoring, limit, monkeypatch):
    monkeypatch.setattr(blocks, "CPU_BLOCK", limit)
    run((2, 3, 4, 5), torch.float64, {"factoring": factoring, "weight_decay": 0.01, "beta1": 0.9}, steps=4)


def test_min_dim_size_to_factor():
    run((5, 3), torch.float64, {"min_dim_size_to_factor": 4})


def test_channels_last():
    run((4, 3, 5, 6), torch.float32, {"beta1": 0.9}, memory_format=torch.channels_last)


@pytest.mark.parametrize("beta1", [None, 0.9])
def test_strides_do_not_matter(beta1):
    base = torch.randn(6, 8)
    gradients = [torch.randn(4, 3) for _ in range(5)]
    moved = []
    for start in (base[::2, 1:5].t(), base[::2, 1:5].t().contiguous()):
        param = torch.nn.Parameter(start.clone(memory_format=torch.preserve_format))
        param.data = start.clone() if start.is_contiguous() else base.clone()[::2, 1:5].t()
        optimizer = Adafactor([param], beta1=beta1)
        for g in gradients:
            param.grad = g.t().contiguous().t() if start.is_contiguous() else g
            optimizer.step()
        moved.append(param.detach())
    torch.testing.assert_close(*moved, rtol=1e-6, atol=1e-7)


def test_a_gradient_of_another_dtype():
    param, exact = torch.nn.Parameter(torch.randn(5, 4)), torch.randn(5, 4).bfloat16()
    twin = torch.nn.Parameter(param.detach().clone())
    param.grad_dtype = None
    param.grad, twin.grad = exact, exact.float()
    Adafactor([param]).step()
    Adafactor([twin]).step()
    assert torch.equal(param, twin)


def test_one_step_has_no_temporary_of_parameter_size():
    """Counted from the shapes of all results of all operations of a step, which is what an allocator would see."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            mine = {t.untyped_storage().data_ptr() for t in args if isinstance(t, torch.Tensor)}
            for t in result if isinstance(result, list | tuple) else [result]:
                if isinstance(t, torch.Tensor) and t.untyped_storage().data_ptr() not in mine:
                    self.elements = max(self.elements, t.numel())
            return result

    # The statistics themselves are as long as the longer side: of that size a buffer is a row or a column buffer.
    for shape in [(2048, 1024), (2, 1 << 20), (1 << 20, 2), (1 << 21,)]:
        param = torch.nn.Parameter(torch.randn(shape, dtype=torch.bfloat16))
        param.grad = torch.randn(shape, dtype=torch.bfloat16)
        optimizer = Adafactor([param], fused=False, stochastic_rounding=True)
        optimizer.step()
        with Largest() as largest:
            optimizer.step()
        assert blocks.CPU_BLOCK // 2 <= largest.elements <= max((blocks.CPU_BLOCK, *shape[: 2 * (len(shape) - 1)]))
