"""The accelerator under the Triton kernels: whether they can run on it, what it gives a program, streams and copies."""

from __future__ import annotations

import importlib.util
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

_BACKENDS = {"cuda": "amd" if torch.version.hip else "nvidia", "xpu": "intel"}


@cache
def why_not(device: torch.device) -> str | None:
    """One sentence that says why Triton kernels cannot run on a device, or ``None`` where they can."""
    kind = device.type
    if kind not in _BACKENDS:
        return f"The Triton kernels are for {' and '.join(_BACKENDS)} tensors, not for {kind} tensors."
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed; the CUDA builds of PyTorch bring it along, or pip install triton."
    module = torch.get_device_module(device)
    if not module.is_available():
        none = kind == "cuda" and torch.version.cuda is None and torch.version.hip is None
        return "This build of PyTorch has no CUDA." if none else f"There is no {kind} device."
    if importlib.util.find_spec(f"triton.backends.{_BACKENDS[kind]}") is None:
        return f"The Triton that is installed has no part for {kind} devices."
    if kind == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device) < (7, 0):
        return f"Triton needs compute capability 7.0 or later, and {torch.cuda.get_device_name(device)} has less."
    if kind == "xpu" and not torch.xpu.get_device_capability(device).get("has_fp64", False):
        return "The Triton kernels count in float64, which this xpu device does not have."
    return None


def device_of(device: torch.device) -> AbstractContextManager[object]:
    """Triton launches on the current device."""
    context: AbstractContextManager[object] = nullcontext()
    return context if device.type == "cpu" else torch.get_device_module(device).device(device)


def is_capturing() -> bool:
    """Whether the current stream of the accelerator is being captured in a graph."""
    module = _accelerator()
    return module is not None and module.is_initialized() and module.is_current_stream_capturing()


@cache
def _accelerator() -> Any:
    """The module of the accelerator whose streams can be captured, where there is one."""
    kind = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    module = None if kind is None else torch.get_device_module(kind)
    return module if hasattr(module, "is_current_stream_capturing") else None


@cache
def lanes(device: torch.device) -> int:
    """Threads of a warp: 64 on the data-center devices of AMD, else 32."""
    if device.type != "cuda":
        return 32
    return int(getattr(torch.cuda.get_device_properties(device), "warp_size", 32))


@cache
def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that a program may have; 99 KB is the least of compute capability 8.0 and later."""
    if device.type != "cuda":
        return 99 * 1024
    return int(getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin", 99 * 1024))


def send(target: Tensor, source: Tensor) -> None:
    """Copy without waiting. A captured copy reads its source again at every replay."""
    target.copy_(source, non_blocking=True)


def pinned(array: NDArray[Any], device: torch.device) -> Tensor:
    """A copy of an array that a device can read while the host goes on."""
    source = torch.from_numpy(array)
    return source.clone() if device.type == "cpu" else source.pin_memory()
