"""What users can do to tensors between two steps, seen before an address is taken.

Parameters are grown, pruned and cast, state is cast, moved and replaced, gradients are kept from before all that. Here
all of it is looked at: what fits is used, what has the right size is cast or recoded as ``load_state_dict`` would, and
the rest is refused in one sentence. Looking costs little where nothing has moved (`Witness`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cache
from operator import is_
from typing import Any

import torch
from torch import Tensor

from adafactor.core.errors import message
from adafactor.core.factoring import Layout, Shape
from adafactor.engine.torch import int8
from adafactor.engine.torch.work import DTYPES, Settings, Work, is_sharded, math_dtype, slots_of

AFRESH = "Delete optimizer.state[parameter] to start it afresh"

_dtype_of: Any = Tensor.dtype.__get__  # type: ignore[attr-defined]
_device_of: Any = Tensor.device.__get__


@cache
def _is_plain(kind: type) -> bool:
    """Whether tensors of a class are memory: one that wraps others says how operations reach these."""
    return kind.__torch_dispatch__ is Tensor.__torch_dispatch__  # type: ignore[attr-defined]


def has_memory(tensor: Tensor) -> bool:
    """Whether a tensor is memory itself, not a wrapper around others, without an address of its own."""
    return _is_plain(type(tensor))


class Witness:
    """What the tensors of a list of work were when they were checked."""

    def __init__(self, work: Sequence[Work]) -> None:
        self._params = [w.param for w in work]
        self._entries = [(w.state, w.slots) for w in work]
        self._tensors = self._now()
        self._plain = [tensor for tensor in self._tensors if has_memory(tensor)]
        self._seen = self._look()
        self.shapes = [param.size() for param in self._params]
        self.devices = [param.device for param in self._params]

    def moved(self) -> bool:
        """Whether a tensor was replaced, or has got another place, dtype, shape or order in memory."""
        try:
            now = self._now()
        except KeyError:
            return True
        return not all(map(is_, now, self._tensors)) or self._look() != self._seen

    def _now(self) -> list[Tensor]:
        return self._params + [state[name] for state, names in self._entries for name in names]

    def _look(self) -> tuple[list[Any], ...]:
        plain = self._plain
        return (
            list(map(Tensor.data_ptr, plain)),
            list(map(_dtype_of, plain)),
            list(map(Tensor.numel, plain)),
            list(map(Tensor.is_contiguous, plain)),
            list(map(Tensor.size, self._params)),
        )

    def fits(self, grads: Sequence[Tensor]) -> bool:
        """Whether the gradients are plain, dense and of their parameters' shapes and devices: nothing else to ask."""
        try:
            return (
                all(map(_is_plain, set(map(type, grads))))
                and all(map(Tensor.is_contiguous, grads))
                and list(map(Tensor.size, grads)) == self.shapes
                and list(map(_device_of, grads)) == self.devices
                and set(map(_dtype_of, grads)) <= _KNOWN
                and 0 not in map(Tensor.data_ptr, grads)
            )
        except RuntimeError:  # a sparse tensor has no such thing
            return False


_KNOWN = frozenset(DTYPES)


def check_param(param: Tensor, name: str) -> None:
    """Refuse a parameter that no backend can update."""
    if is_flat(param):
        remedy = "Use fully_shard (FSDP2), whose parameters keep their shapes; docs/sharding.md shows how."
        got = f"a flat shard of FSDP1 with shape {tuple(param.shape)}"
        raise RuntimeError(message(name, "a tensor with the rows and columns of its layer", got, remedy))
    _check_dtype(name, param)
    if not param.is_contiguous() and any(s == 0 and n > 1 for s, n in zip(param.stride(), param.shape, strict=True)):
        remedy = "Several elements share one place in memory; pass the tensor before expand()."
        raise RuntimeError(message(name, "writable element by element", tuple(param.shape), remedy))
    _check_memory(name, param)


def check_gradient(param: Tensor, grad: Tensor, name: str) -> None:
    """Refuse a gradient that does not fit its parameter."""
    what = f"the gradient of {name}"
    if grad.layout != torch.strided:
        remedy = "Build the embedding with sparse=False."
        raise RuntimeError(message(what, "dense for Adafactor", str(grad.layout), remedy))
    _check_dtype(what, grad)
    if grad.shape != param.shape:
        remedy = "Clear gradients (zero_grad) when a parameter gets another shape, and call backward again."
        raise RuntimeError(message(what, f"of the parameter's shape {tuple(param.shape)}", tuple(grad.shape), remedy))
    if grad.device != param.device:
        remedy = "Move the parameter and its gradient together."
        raise RuntimeError(message(what, f"on the parameter's device {param.device}", str(grad.device), remedy))
    _check_memory(what, grad)


def _check_dtype(what: str, tensor: Tensor) -> None:
    if tensor.dtype not in DTYPES:
        remedy = "Store a complex parameter as its torch.view_as_real." if tensor.is_complex() else "Convert it."
        rule = "float32, float64, bfloat16 or float16 for Adafactor"
        raise RuntimeError(message(what, rule, tensor.dtype, remedy))


def _check_memory(what: str, tensor: Tensor) -> None:
    """Refuse a tensor whose storage was freed or shrunk under it."""
    if not has_memory(tensor) or tensor.device.type == "meta" or not tensor.numel():
        return
    reach = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True)) + 1
    needed = (tensor.storage_offset() + reach) * tensor.element_size()
    if tensor.untyped_storage().nbytes() < needed:
        remedy = "Its memory was freed: give it memory again, or leave it out of the step (grad = None)."
        got = f"{tensor.untyped_storage().nbytes()} bytes"
        raise RuntimeError(message(what, f"backed by the {needed} bytes that its shape takes", got, remedy))


def is_flat(param: Tensor) -> bool:
    """Whether it is FSDP1's FlatParameter, or one of the pieces that ``use_orig_params=True`` shows of it."""
    return bool(getattr(param, "_fsdp_flattened", False))


def fit(param: Tensor, layout: Layout, settings: Settings, state: Mapping[str, Any], name: str) -> dict[str, Any]:
    """What has to be written into a parameter's state before its next update; ``None`` for what has to go.

    Nothing is written here. A parameter without state gets zeros (their weight is 0 at t = 1).

    Raises:
        RuntimeError: the state belongs to another shape, factoring or device, or is no tensor.
    """
    slots = slots_of(layout, settings, param.dtype)
    statistics = ("step", *layout.slots)
    there = [slot for slot in statistics if slot in state]
    if there and len(there) < len(statistics):
        remedy = f"{AFRESH}, or construct the optimizer with the factoring that wrote it."
        raise RuntimeError(message(f"the state of {name}", " and ".join(statistics), sorted(map(str, state)), remedy))
    dtype = math_dtype(param.dtype)
    shapes: dict[str, Shape] = {"step": (), **layout.slots, "momentum": layout.shape, "residual": layout.shape}
    dtypes = {"step": torch.int64, "residual": torch.bfloat16, "momentum": settings.momentum_dtype or dtype}
    if "momentum_scale" in slots:
        shapes["momentum_scale"], dtypes["momentum_scale"] = (int8.scales(param.numel()),), torch.float32
    changes: dict[str, Any] = {}
    held = dict(state)
    if "momentum" in slots and "momentum" in held:
        changes |= _recoded(held, layout, "momentum_scale" in slots, name)
        held |= changes
    for slot in slots:
        wanted = dtypes.get(slot, dtype)
        if held.get(slot) is None:
            changes[slot] = _zeros(param, slot, shapes[slot], wanted)
            continue
        value = _fitted(held[slot], slot, param, (shapes[slot], wanted), name)
        if value is not state.get(slot):
            changes[slot] = value
    return changes


def _zeros(param: Tensor, slot: str, shape: Shape, dtype: torch.dtype) -> Tensor:
    if slot in ("momentum", "residual") and dtype != torch.int8:
        return torch.zeros_like(param, dtype=dtype, memory_format=torch.preserve_format, requires_grad=False)
    return torch.zeros(shape, dtype=dtype, device=param.device)


def _fitted(value: Any, slot: str, param: Tensor, wanted: tuple[Shape, torch.dtype], name: str) -> Tensor:
    """The value itself where it fits, else a copy that does."""
    shape, dtype = wanted
    what = f"{slot} in the state of {name}"
    if slot == "step" and isinstance(value, int | float) and not isinstance(value, bool):
        value = torch.tensor(value)
    if not isinstance(value, Tensor):
        raise RuntimeError(message(what, f"a tensor of shape {shape}", type(value).__name__, f"{AFRESH}."))
    if is_sharded(value):
        value = value.full_tensor()  # type: ignore[attr-defined]
    if value.layout != torch.strided or value.is_complex() or value.is_quantized:
        raise RuntimeError(message(what, "a dense tensor of real numbers", str(value.dtype), f"{AFRESH}."))
    if value.numel() != math.prod(shape):
        remedy = f"{AFRESH}, or give its state the rows that the parameter has got or lost."
        raise RuntimeError(message(what, f"of shape {shape} for {tuple(param.shape)}", tuple(value.shape), remedy))
    if value.device.type == "meta" and param.device.type != "meta":
        raise RuntimeError(message(what, f"on {param.device}", "no numbers (device meta)", f"{AFRESH}."))
    _check_memory(what, value)
    if slot == "step" and has_memory(value) and value.device.type == "cpu" and not 0 <= float(value) < 2**63:
        raise RuntimeError(message(what, "an integer >= 0", value.item(), f"{AFRESH}."))
    like_param = slot in ("momentum", "residual") and dtype != torch.int8
    if value.dtype != dtype or value.device != param.device or tuple(value.shape) != shape:
        value = value.detach().reshape(shape).to(param.device, dtype, copy=True)
    if like_param and value.stride() != param.stride() and not value.is_contiguous():
        value = torch.empty_like(param, dtype=dtype, requires_grad=False).copy_(value)
    fitted: Tensor = value if like_param or value.is_contiguous() else value.contiguous()
    return fitted


def _recoded(state: Mapping[str, Any], layout: Layout, coded: bool, name: str) -> dict[str, Any]:
    """Momentum turned from 8-bit codes into numbers or back, where the state has the one and the group the other."""
    momentum, scale = state["momentum"], state.get("momentum_scale")
    if not isinstance(momentum, Tensor) or momentum.numel() != math.prod(layout.shape):
        return {}
    is_coded = momentum.dtype == torch.int8
    if is_coded and (not isinstance(scale, Tensor) or scale.numel() != int8.scales(momentum.numel())):
        remedy = "Delete momentum from its state to start the average afresh."
        got = "none" if scale is None else f"{tuple(getattr(scale, 'shape', ()))}"
        rule = f"beside its 8-bit momentum, of shape ({int8.scales(momentum.numel())},)"
        raise RuntimeError(message(f"momentum_scale in the state of {name}", rule, got, remedy))
    if is_coded and not coded:
        assert scale is not None
        numbers = int8.decode(momentum.contiguous(), scale.to(torch.float32).contiguous())
        return {"momentum": numbers.view(layout.shape), "momentum_scale": None}
    if coded and not is_coded:
        codes, scales = int8.encode(momentum.detach().to(torch.float32).contiguous())
        return {"momentum": codes.view(layout.shape), "momentum_scale": scales}
    return {}


def write(state: dict[str, Any], changes: Mapping[str, Any]) -> None:
    """Carry out what `fit` has found."""
    for slot, value in changes.items():
        if value is None:
            state.pop(slot, None)
        else:
            state[slot] = value
