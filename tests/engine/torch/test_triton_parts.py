"""Parts of a parameter through the Triton kernels' verbs: with their sums added up they make the whole one's step.

The sums are added by hand, so no process group is needed; ``tests/engine/torch/sharded`` has the processes.
"""

import pytest
import torch
from triton_support import DEVICE, use

from adafactor import layout as layout_of
from adafactor.core.factoring import Factored, Part
from adafactor.engine.torch import cuda
from adafactor.engine.torch.triton import forms
from adafactor.engine.torch.work import Group, Work
from adafactor.torch import Adafactor
from adafactor.torch.arguments import translate

STEPS = 3


def work_of(x, layout, **options):
    """One item of work on ``x``, with a state of zeros."""
    param = torch.nn.Parameter(x.to(DEVICE))
    optimizer = Adafactor([param], **options)
    group = optimizer.param_groups[0]
    state = {"step": torch.zeros((), dtype=torch.int64, device=DEVICE)}
    state |= {name: torch.zeros(shape, device=DEVICE) for name, shape in layout.slots.items()}
    if options.get("beta1"):
        state["momentum"] = torch.zeros(x.shape, device=DEVICE)
    return Work(param, state, layout, Group(translate(group), group["lr"]), 0)


def cut(whole, lengths, axis=0):
    """A layout cut along an axis; its rows are what is cut, if either side is."""
    first = 0
    for length in lengths:
        shape, offset = list(whole.shape), [0] * len(whole.shape)
        shape[axis], offset[axis] = length, first
        sides = (whole.columns, whole.rows) if axis in whole.columns else (whole.rows, whole.columns)
        part = Part(tuple(shape), *sides, whole.batch, whole.shape, tuple(offset), frozenset({axis}))
        yield (*[slice(None)] * axis, slice(first, first + length)), part
        first += length


def add_up(sums):
    """One all-reduce, by hand: every part's sums become the sum of all parts'."""
    for name in ("S", "W", "Q"):
        values = [getattr(one, name) for one in sums]
        if values[0] is not None:
            total = torch.stack(list(values)).sum(0)
            for value in values:
                value.copy_(total)


OPTIONS = {
    "default": {},
    "momentum": {"beta1": 0.9, "weight_decay": 0.1},
    "stochastic": {"stochastic_rounding": True, "seed": 7},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize(
    ("shape", "axis"),
    [((13, 40), 0), ((10, 3, 8), 0), ((9, 300), 0), ((40, 13), 1), ((300, 9), 1), ((90,), 0)],
    ids=str,
)
@pytest.mark.filterwarnings("ignore")
def test_parts_cut_along_one_axis(monkeypatch, shape, axis, options):
    """FSDP2's Shard(0), uneven: a matrix, rows of several axes, rows wider than a tile, a vector; and Shard(1)."""
    use(monkeypatch)
    generator = torch.Generator().manual_seed(0)
    dtype = torch.bfloat16 if options.get("stochastic_rounding") else torch.float32
    x = torch.randn(shape, generator=generator).to(dtype)
    rows = len(shape) - 1
    whole = layout_of(shape, lambda name, shape: Factored(tuple(range(rows)), (rows,)) if rows else None)
    one = work_of(x.clone(), whole, **options)
    length = shape[axis]
    places, parts = zip(*cut(whole, (length // 2, length // 3, length - length // 2 - length // 3), axis), strict=True)
    work = [work_of(x[place].clone(), part, **options) for place, part in zip(places, parts, strict=True)]
    assert all(forms.form_of(w) is not None for w in work)
    alone, backends = cuda.Triton([one]), [cuda.Triton([w]) for w in work]
    skipped = torch.zeros((), dtype=torch.int64, device=DEVICE)
    with torch.no_grad():
        for _ in range(STEPS):
            g = (torch.randn(shape, generator=generator)).to(dtype).to(DEVICE)
            alone.step([g], skipped)
            local = [g[place].contiguous() for place in places]  # apply reads them again
            add_up([b.measure([its])[0] for b, its in zip(backends, local, strict=True)])
            for backend in backends:
                backend.finish()
                backend.apply(skipped)
    stored = torch.cat([w.param.detach() for w in work], axis)
    if dtype == torch.bfloat16:  # the same draws: an element is numbered in the whole parameter
        assert (stored != one.param).float().mean() < 0.02
    else:
        torch.testing.assert_close(stored, one.param.detach(), rtol=2e-6, atol=1e-6)
    for name, local in zip(one.layout.slots, list(parts[0].slots)[:: -1 if axis else 1], strict=True):
        kept = [w.state[local] for w in work]
        value = kept[0] if local == "column" else torch.cat(kept)
        torch.testing.assert_close(value, one.state[name], rtol=4e-6, atol=0)
    assert [int(w.state["step"]) for w in work] == [STEPS] * len(work)
    assert skipped == 0


def test_a_part_that_is_not_finite_elsewhere_is_left_alone(monkeypatch):
    use(monkeypatch)
    whole = layout_of((6, 20))
    ((place, part), *_) = cut(whole, (3, 3))
    x = torch.ones(3, 20)
    w = work_of(x.clone(), part)
    backend, skipped = cuda.Triton([w]), torch.zeros((), dtype=torch.int64, device=DEVICE)
    with torch.no_grad():
        (sums,) = backend.measure([torch.ones(3, 20, device=DEVICE)])
        sums.W.add_(float("nan"))  # another process's gradient
        backend.finish()
        backend.apply(skipped)
    assert torch.equal(w.param.detach().cpu(), x)
    assert int(skipped) == 1
    assert int(w.state["step"]) == 0
    assert place == (slice(0, 3),)


def test_a_tensor_without_a_gradient_is_left_alone(monkeypatch):
    """One table for all parameters: an address of 0 is no gradient."""
    use(monkeypatch)
    work = [work_of(torch.ones(shape), layout_of(shape), beta1=0.9) for shape in [(6, 20), (300,), (2, 600), (9, 3, 3)]]
    backend, skipped = cuda.Triton(work), torch.zeros((), dtype=torch.int64, device=DEVICE)
    with torch.no_grad():
        for absent in (range(0), (0, 2), (1, 3), range(4)):
            before = [(w.param.detach().clone(), int(w.state["step"])) for w in work]
            backend.step([None if k in absent else torch.ones_like(w.param) for k, w in enumerate(work)], skipped)
            for k, (w, (x, t)) in enumerate(zip(work, before, strict=True)):
                assert torch.equal(w.param, x) == (k in absent)
                assert int(w.state["step"]) == t + (k not in absent)
    assert skipped == 0
