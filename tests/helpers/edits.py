"""A step of ``adafactor.torch`` after an edit: right from what is stored, or refused with nothing written."""

from __future__ import annotations

import numpy as np
import torch

from adafactor import layout
from adafactor.core import reference
from adafactor.engine.torch import int8
from adafactor.torch.arguments import translate

#: Of a step from stored numbers, in units of the parameter's largest element.
ROUNDING = {torch.float64: 1e-12, torch.float32: 5e-6, torch.float16: 1.1e-3, torch.bfloat16: 8.5e-3}


def numbers(value):
    """A tensor or a Python number as float64."""
    if not isinstance(value, torch.Tensor):
        return np.float64(value)
    value = getattr(value, "wrapped", value).detach()
    if value.numel() and not backed(value):
        raise ValueError("freed")  # torch would read it
    return value.resolve_neg().double().numpy()


def backed(tensor):
    """Whether it has all of its memory, and may be looked at."""
    if type(tensor) not in (torch.Tensor, torch.nn.Parameter) or tensor.device.type == "meta":
        return False
    if tensor.layout != torch.strided or not tensor.numel():
        return False
    last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.untyped_storage().nbytes() >= (tensor.storage_offset() + last + 1) * tensor.element_size()


def contents(optimizer):
    """All that a step may write: which objects there are, and their bytes."""

    def of(value):
        if not isinstance(value, torch.Tensor) or not backed(value):
            return id(value), None
        flat = torch.empty(value.numel(), dtype=value.dtype).copy_(value.detach().reshape(-1))
        return id(value), flat.view(torch.uint8).numpy().tobytes()

    found = []
    for group in optimizer.param_groups:
        for param in group["params"]:
            state = optimizer.state.get(param)
            slots = {name: of(value) for name, value in state.items()} if isinstance(state, dict) else state
            found.append((of(param), id(state), slots))
    return found


def expected(optimizer, param, group):
    """The oracle's step of one parameter from the numbers that are stored now."""
    lay = layout(param.shape, group["factoring"], group["min_dim_size_to_factor"])
    hp = translate(group).hyperparameters
    start, held = reference.init(lay, hp), optimizer.state.get(param) or {}
    if held.get("step") is not None:
        moments = {name: numbers(held[name]).reshape(shape) for name, shape in lay.slots.items()}
        momentum = start.momentum
        if momentum is not None and held.get("momentum") is not None:
            stored = held["momentum"]
            if stored.dtype == torch.int8 and backed(stored):
                stored = int8.decode(stored.contiguous(), held["momentum_scale"].float().contiguous())
            momentum = numbers(stored).reshape(lay.shape)
        start = reference.State(moments, momentum, int(held["step"]))
    x, g = numbers(param), numbers(param.grad)
    return reference.step(x, -g if group["maximize"] else g, start, lay, hp, float(group["lr"]))


def stored(optimizer):
    """The dtypes of every parameter's momentum and statistics."""
    return {
        param: {slot: value.dtype for slot, value in state.items() if isinstance(value, torch.Tensor)}
        for param, state in optimizer.state.items()
        if isinstance(state, dict)
    }


def check(optimizer):
    """Step once. ``"right"`` or the sentence that refused it; AssertionError for anything else."""
    before, dtypes = contents(optimizer), stored(optimizer)
    try:
        with np.errstate(all="ignore"):
            wanted = [
                (param, numbers(param).copy(), *expected(optimizer, param, group))
                for group in optimizer.param_groups
                for param in group["params"]
                if param.grad is not None and param.numel()
            ]
        why = None
    except Exception as error:  # what makes no sense to the oracle must be refused
        wanted, why = None, repr(error)
    try:
        optimizer.step()
    except (RuntimeError, TypeError, ValueError) as error:
        told = str(error)
        assert " must be " in told, f"not a sentence of ours: {told!r}"
        assert ", got " in told, f"not a sentence of ours: {told!r}"
        assert contents(optimizer) == before, f"refused, and something was written: {told}"
        return told
    assert wanted is not None, f"stepped, where the oracle cannot: {why}"
    after_dtypes = stored(optimizer)
    for param, old, x, after in wanted:
        if not np.isfinite(x).all():
            continue  # an edit has made numbers of which no step is right
        off, moved = float(np.abs(numbers(param) - x).max()), float(np.abs(x - old).max())
        recoded = any(dtypes.get(param, {}).get(slot, dtype) != dtype for slot, dtype in after_dtypes[param].items())
        allowed = ROUNDING[param.dtype] * float(np.abs(x).max()) + (0.03 if recoded else 1e-5) * moved
        assert off <= allowed, f"a {param.dtype} parameter moved by {moved:.3g} and is off by {off:.3g}"
        state = optimizer.state[param]
        assert int(state["step"]) == after.t
        for name, value in after.second_moment.items():
            np.testing.assert_allclose(numbers(state[name]), value, rtol=1e-4, atol=1e-4 * np.abs(value).max())
    return "right"
