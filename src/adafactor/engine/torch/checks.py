"""What users can do to tensors between two steps, seen before an address is taken.

Parameters are grown, pruned and cast, state is cast, moved and replaced, gradients are kept from before all that. Here
all of it is looked at: what fits is used, what has the right size is cast or recoded as ``load_state_dict`` would, and
the rest is refused in one sentence. Looking costs little where nothing has moved (`Witness`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from operator import attrgetter, is_
from typing import Any, Protocol

import torch
from torch import Tensor

from adafactor.core.errors import message
from adafactor.core.factoring import Layout, Shape
from adafactor.engine.torch import int8
from adafactor.engine.torch.memory import Memory
from adafactor.engine.torch.work import DTYPES, MOST_UPDATES, Settings, slot_dtype, slots_of, whole_of

AFRESH = "Delete optimizer.state[parameter] to start it afresh"

_dtype_of, _device_of = attrgetter("dtype"), attrgetter("device")


@cache
def _is_plain(kind: type) -> bool:
    """Whether tensors of a class are memory: one that wraps others says how operations reach these."""
    return kind.__torch_dispatch__ is Tensor.__torch_dispatch__  # type: ignore[attr-defined]


def has_memory(tensor: Tensor) -> bool:
    """Whether a tensor is memory itself: not a wrapper without an address, nor negated when it is read."""
    return _is_plain(type(tensor)) and not tensor.is_neg()


class Written(Protocol):
    """A parameter, and the state that is written beside it under the names of ``slots``."""

    @property
    def param(self) -> Tensor: ...
    @property
    def state(self) -> Mapping[str, Tensor]: ...
    @property
    def slots(self) -> Sequence[str]: ...


class Witness:
    """What the tensors of a list of work were when they were checked."""

    def __init__(self, work: Sequence[Written]) -> None:
        self._params = [w.param for w in work]
        self._entries = [(w.state, w.slots) for w in work]
        self._tensors = self._now()
        self._plain = [tensor for tensor in self._tensors if _is_plain(type(tensor))]
        self._strided = [tensor for tensor in self._plain if not tensor.is_contiguous()]
        self._memory = Memory(self._plain)
        self._places, self._form = self._memory.look().tobytes(), self._look()
        self._alike, self._grads_alike = _alike(self._tensors), _never
        self._reach = b""

    def moved(self) -> bool:
        """Whether a tensor was replaced, or has got another place, dtype, shape or order in memory."""
        try:
            now = self._now()
        except KeyError:
            return True
        if not all(map(is_, now, self._tensors)) or self._memory.look().tobytes() != self._places:
            return True
        if not self._alike(*now):  # or asked in another mode of autograd or autocast
            if self._look() != self._form:
                return True
            self._alike = _alike(now)
        return False

    def _now(self) -> list[Tensor]:
        return self._params + [state[name] for state, names in self._entries for name in names]

    def _look(self) -> tuple[list[Any], ...]:
        return (
            list(map(_dtype_of, self._tensors)),
            list(map(Tensor.size, self._tensors)),
            list(map(Tensor.is_contiguous, self._plain)),
            list(map(Tensor.stride, self._strided)),
            list(map(Tensor.is_neg, self._params)),
        )

    def fits(self, grads: Sequence[Any]) -> bool:
        """Whether the gradients are plain, dense and of their parameters' shapes and devices: nothing else to ask.

        ``None`` is none, and fits.
        """
        if len(grads) != len(self._params):
            return False
        if self._grads_alike(*grads):
            return self._are_backed(grads)
        here = [k for k, grad in enumerate(grads) if grad is not None]
        there = [grads[k] for k in here]
        if not self._fit(there, [self._params[k] for k in here]):
            return False
        self._grads_alike, self._reach = _alike(grads), b""
        return self._are_backed(there)

    def _fit(self, grads: Sequence[Tensor], params: Sequence[Tensor]) -> bool:
        try:
            return (
                all(map(_is_plain, set(map(type, grads))))
                and all(map(Tensor.is_contiguous, grads))
                and list(map(Tensor.size, grads)) == list(map(Tensor.size, params))
                and list(map(_device_of, grads)) == list(map(_device_of, params))
                and _KNOWN.issuperset(map(_dtype_of, grads))
                and not any(map(Tensor.is_neg, grads))
            )
        except RuntimeError:  # a sparse tensor has no such thing
            return False

    def _are_backed(self, grads: Sequence[Tensor]) -> bool:
        """Whether their storages hold all of the gradients: computed once for each list of places in storages."""
        _, stored, offsets = looked = Memory(grads).look()
        reach = looked[1:].tobytes()
        if reach != self._reach:
            sizes, widths = list(map(Tensor.numel, grads)), list(map(Tensor.element_size, grads))
            if ((offsets + sizes) * widths > stored).any():
                return False
            self._reach = reach
        return True


def _alike(tensors: Sequence[Tensor]) -> Callable[..., bool]:
    """Asks in one call whether tensors have the class, dtype, device, sizes, strides and views' flags that these have.

    PyTorch has it for compiled code, and for nobody else; where it is not there, the question is never answered by yes.
    """
    try:
        from torch._C._dynamo.guards import TensorGuards

        return TensorGuards(*tensors, dynamic_dims_sizes=None, dynamic_dims_strides=None).check
    except (ImportError, TypeError, RuntimeError):
        return _never


def _never(*tensors: Tensor) -> bool:
    return False


_KNOWN = frozenset(DTYPES)


def check_step(step: Tensor, name: str) -> None:
    """Refuse a number of updates that is none; not on a device, where it would have to be waited for."""
    if step.device.type == "cpu" and has_memory(step) and not 0 <= step.item() < MOST_UPDATES:
        what = f"step in the state of {name}"
        raise RuntimeError(message(what, "an integer >= 0", step.item(), f"{AFRESH}."))


def check_apart(work: Sequence[tuple[Tensor, Mapping[str, Any], str]]) -> None:
    """Refuse state that shares memory with the state of another parameter, or with any parameter.

    Args:
        work: parameters, what is written beside each, and their names.
    """
    places: dict[torch.device, list[tuple[int, int, bool, str]]] = {}
    for param, written, name in work:
        for slot, tensor in (("", param), *written.items()):
            if isinstance(tensor, Tensor) and has_memory(tensor) and tensor.numel() and tensor.device.type != "meta":
                begin, is_param = tensor.data_ptr(), not slot
                called = name if is_param else f"{slot} in the state of {name}"
                end = begin + _reach(tensor) * tensor.element_size()
                places.setdefault(tensor.device, []).append((begin, end, is_param, called))
    for intervals in places.values():
        intervals.sort()
        # The farthest end so far, of parameters and of state: parameters that share memory take turns (``choose.py``).
        ends: dict[bool, tuple[int, str]] = {False: (0, ""), True: (0, "")}
        for begin, end, is_param, called in intervals:
            for kind in (False,) if is_param else (False, True):
                if begin < ends[kind][0]:
                    remedy = "Give every parameter tensors of its own: clone() them."
                    raise RuntimeError(message(called, "memory of its own", f"that of {ends[kind][1]}", remedy))
            ends[is_param] = max(ends[is_param], (end, called))


def _reach(tensor: Tensor) -> int:
    """How many elements lie between a tensor's first and last, both counted."""
    return sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True)) + 1


def check_param(param: Tensor, name: str) -> None:
    """Refuse a parameter that no backend can update."""
    _check_dtype(name, param)
    if not param.is_contiguous() and any(s == 0 and n > 1 for s, n in zip(param.stride(), param.shape, strict=True)):
        remedy = "Several elements share one place in memory; pass the tensor before expand()."
        raise RuntimeError(message(name, "writable element by element", tuple(param.shape), remedy))
    check_memory(name, param)


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
    check_memory(what, grad)


def _check_dtype(what: str, tensor: Tensor) -> None:
    if tensor.dtype not in DTYPES:
        remedy = "Store a complex parameter as its torch.view_as_real." if tensor.is_complex() else "Convert it."
        rule = "float32, float64, bfloat16 or float16 for Adafactor"
        raise RuntimeError(message(what, rule, tensor.dtype, remedy))


def check_memory(what: str, tensor: Tensor) -> None:
    """Refuse a tensor whose storage was freed or shrunk under it."""
    if not has_memory(tensor) or tensor.device.type == "meta" or not tensor.numel():
        return
    needed = (tensor.storage_offset() + _reach(tensor)) * tensor.element_size()
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
    check_complete(layout, state, name)
    shapes: dict[str, Shape] = {"step": (), **layout.slots, "momentum": layout.shape, "residual": layout.shape}
    shapes["momentum_scale"] = (int8.scales(param.numel()),)
    changes: dict[str, Any] = {}
    held = dict(state)
    if "momentum" in slots and "momentum" in held:
        changes |= recoded(held, layout, "momentum_scale" in slots, name)
        held |= changes
    for slot in slots:
        wanted = shapes[slot], slot_dtype(slot, settings, param.dtype)
        value = fitted(held.get(slot), slot, param, wanted, name)
        if value is not state.get(slot):
            changes[slot] = value
    return changes


def check_float_momentum(what: str, settings: Settings) -> None:
    """Refuse int8 momentum of what is cut."""
    if settings.momentum_dtype == torch.int8 and settings.hyperparameters.momentum is not None:
        remedy = "Its blocks of 256 elements would cross the shards; torch.bfloat16 is the smallest here."
        raise RuntimeError(message(f"momentum_dtype of {what}", "a float dtype", torch.int8, remedy))


def check_complete(layout: Layout, state: Any, name: str) -> None:
    """Refuse state that is no dictionary, or has some of the statistics and not all."""
    if not isinstance(state, Mapping):
        raise RuntimeError(message(f"the state of {name}", "a dictionary", type(state).__name__, f"{AFRESH}."))
    statistics = ("step", *layout.slots)
    there = [slot for slot in statistics if state.get(slot) is not None]
    if there and len(there) < len(statistics):
        remedy = f"{AFRESH}, or construct the optimizer with the factoring that wrote it."
        got = sorted(str(slot) for slot, value in state.items() if value is not None)
        raise RuntimeError(message(f"the state of {name}", " and ".join(statistics), got, remedy))


def fitted(value: Any, slot: str, param: Tensor, wanted: tuple[Shape, torch.dtype], name: str) -> Tensor:
    """The value itself where it fits a slot of a shape and a dtype, else a copy that does; zeros for ``None``."""
    shape, dtype = wanted
    like_param = slot in ("momentum", "residual") and dtype != torch.int8
    if value is None and like_param:
        return torch.zeros_like(param, dtype=dtype, memory_format=torch.preserve_format, requires_grad=False)
    if value is None:
        return torch.zeros(shape, dtype=dtype, device=param.device)
    what = f"{slot} in the state of {name}"
    if slot == "step" and isinstance(value, int | float) and not isinstance(value, bool):
        value = torch.tensor(value, dtype=torch.float64)
    if not isinstance(value, Tensor):
        raise RuntimeError(message(what, f"a tensor of shape {shape}", type(value).__name__, f"{AFRESH}."))
    value = whole_of(value)
    if value.layout != torch.strided or value.is_complex() or value.is_quantized:
        raise RuntimeError(message(what, "a dense tensor of real numbers", str(value.dtype), f"{AFRESH}."))
    if value.numel() != math.prod(shape):
        remedy = f"{AFRESH}, or give its state the rows that the parameter has got or lost."
        raise RuntimeError(message(what, f"of shape {shape} for {tuple(param.shape)}", tuple(value.shape), remedy))
    if (value.device.type == "meta") != (param.device.type == "meta"):
        got = "no numbers (device meta)" if value.device.type == "meta" else str(value.device)
        raise RuntimeError(message(what, f"on {param.device}", got, f"{AFRESH}."))
    check_memory(what, value)
    if slot == "step":
        for count in value.reshape(-1) if value.dim() else (value,):
            check_step(count, name)
    value = value.resolve_neg()
    if value.dtype != dtype or value.device != param.device or tuple(value.shape) != shape:
        value = value.detach().reshape(shape).to(param.device, dtype, copy=True)
    if like_param and value.stride() != param.stride() and not value.is_contiguous():
        value = torch.empty_like(param, dtype=dtype, requires_grad=False).copy_(value)
    fit: Tensor = value if like_param or value.is_contiguous() else value.contiguous()
    return fit


def recoded(state: Mapping[str, Any], layout: Layout, coded: bool, name: str) -> dict[str, Any]:
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
