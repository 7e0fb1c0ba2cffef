"""The torch kernel against the oracle: `reference.py` in float64, over shapes, dtypes, layouts and options."""

import pytest
import torch
from torch_support import follow, words
from trajectories import LAYOUTS, OPTIONS, Trajectory

from adafactor.engine.torch import blocks
from adafactor.torch import Adafactor

SHAPES = [(), (1,), (7,), (5, 3), (1, 6), (6, 1), (2, 4, 3), (3, 3, 4, 5), (2, 1, 3, 2, 4)]


def run(shape, dtype, options, steps=10, **place):
    follow([Trajectory("torch", shape, dtype, options)], steps, place=place, **words(options))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16"])
def test_shapes_and_dtypes(shape, dtype):
    run(shape, dtype, {})


@pytest.mark.parametrize("shape", [(7,), (5, 3), (2, 4, 3)], ids=str)
@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_options(shape, dtype, options):
    run(shape, dtype, options)


@pytest.mark.parametrize("factoring", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_layouts(factoring, dtype):
    run((2, 3, 4, 5), dtype, {"factoring": factoring, "weight_decay": 0.01})


@pytest.mark.parametrize("limit", [1, 3, 7, 20, 64])
@pytest.mark.parametrize("factoring", ["last_two", *LAYOUTS.values()], ids=["last_two", *LAYOUTS])
def test_blocks_of_any_size_give_the_same(factoring, limit, monkeypatch):
    monkeypatch.setattr(blocks, "CPU_BLOCK", limit)
    run((2, 3, 4, 5), "float64", {"factoring": factoring, "weight_decay": 0.01, "beta_1": 0.9}, steps=4)


def test_min_dim_size_to_factor():
    run((5, 3), "float64", {"min_dim_size_to_factor": 4})


def test_channels_last():
    run((4, 3, 5, 6), "float32", {"beta_1": 0.9}, memory_format=torch.channels_last)


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
