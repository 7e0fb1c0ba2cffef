"""Where tensors are in memory, asked of PyTorch for a whole list at a time.

Its stable C interface, that of AOTInductor, answers in a few nanoseconds what a method in Python does in fifty. It
takes the address of a C++ tensor; every Python tensor holds its own, all of them at the same place.
"""

from __future__ import annotations

import ctypes
import sys
from array import array
from collections.abc import Sequence
from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from adafactor.core import native


class Memory:
    """A list of tensors that are memory themselves, and of ``None``."""

    def __init__(self, tensors: Sequence[Tensor | None]) -> None:
        self._tensors = tensors
        self._ids = array("q", map(id, tensors))

    def look(self) -> NDArray[np.int64]:
        """Three rows: their addresses, the bytes of their storages, and the elements before them there; 0 for none."""
        asked = _interface()
        answers = None if asked is None else asked.about(self._ids)
        if answers is not None:
            return answers
        none = (0, 0, 0)
        looked = [
            none if tensor is None else (tensor.data_ptr(), tensor.untyped_storage().nbytes(), tensor.storage_offset())
            for tensor in self._tensors
        ]
        return np.array(looked, np.int64).reshape(-1, 3).T


def addresses_of(tensors: Sequence[Tensor | None]) -> NDArray[np.int64]:
    """Their addresses; 0 for ``None``."""
    addresses: NDArray[np.int64] = Memory(tensors).look()[0]
    return addresses


@cache
def _interface() -> native.Asked | None:
    """PyTorch's functions, where they are known and so is what to hand to them."""
    if sys.implementation.name != "cpython" or native.why_not() is not None:
        return None
    probes = torch.empty(1), torch.nn.Parameter(torch.empty(1))
    words = [(ctypes.c_uint64 * (Tensor.__basicsize__ // 8)).from_address(id(probe)) for probe in probes]
    wanted = tuple(probe._cdata for probe in probes)
    offsets = [8 * k for k, pair in enumerate(zip(*words, strict=True)) if pair == wanted]
    library = ctypes.CDLL(torch._C.__file__)
    names = [f"aoti_torch_get_{question}" for question in ("data_ptr", "storage_size", "storage_offset")]
    if len(offsets) != 1 or not all(hasattr(library, name) for name in names):
        return None
    return native.Asked([ctypes.cast(library[name], ctypes.c_void_p).value or 0 for name in names], offsets[0])
