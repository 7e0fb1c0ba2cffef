"""PyTorch's ``.pt``, ``.pth`` and ``.bin``: a state dict, read by PyTorch in the child of ``sandbox``."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from adafactor.core.errors import Refused, message
from adafactor.core.untrusted import cut
from adafactor.planning.parameters import Parameter

MAX_PICKLE = 100_000_000
#: Where training programs put the model's state in a checkpoint.
_MODELS = ("state_dict", "model_state_dict", "model", "module", "params", "weights")


def read(path: Path) -> list[Parameter]:
    """The tensors of a state dict that ``torch.save`` wrote; their memory is mapped and never touched."""
    name, remedy = cut(path.name), "Save it again with torch.save(model.state_dict(), ...)."
    try:
        with zipfile.ZipFile(path) as archive:
            pickles = [info.file_size for info in archive.infolist() if info.filename.endswith("/data.pkl")]
    except (zipfile.BadZipFile, NotImplementedError, ValueError):
        raise Refused(message(name, "a zip archive, as torch.save writes it", "something else", remedy)) from None
    if len(pickles) != 1 or pickles[0] > MAX_PICKLE:
        rule = f"an archive of one data.pkl of at most {MAX_PICKLE:,} bytes"
        raise Refused(message(name, rule, cut(pickles), remedy))
    try:
        import torch
    except ImportError:
        raise Refused(f"Reading {name} needs PyTorch. Install with: pip install torch") from None
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except MemoryError:
        raise
    except Exception as error:  # whatever its unpickler trips over
        first = cut(str(error).strip().partition("\n")[0])
        raise Refused(message(name, f"a state dict of tensors ({first})", type(error).__name__, remedy)) from None
    tensors = _tensors(loaded)
    if tensors is None:
        rule = f"a state dict, or one under {', '.join(_MODELS)}"
        raise Refused(message(name, rule, type(loaded).__name__, remedy))
    parameters, seen = list[Parameter](), set[tuple[Any, ...]]()
    for key, tensor in tensors.items():
        place = (tensor.untyped_storage().data_ptr(), tensor.storage_offset(), tuple(tensor.shape), tensor.stride())
        if tensor.numel() and place in seen:
            continue  # tied weights are one parameter
        seen.add(place)
        dtype = str(tensor.dtype).removeprefix("torch.")
        parameters.append(Parameter(str(key), tuple(tensor.shape), "float8" if dtype.startswith("float8") else dtype))
    return parameters


def _tensors(loaded: Any) -> dict[str, Any] | None:
    import torch

    if not isinstance(loaded, Mapping):
        return None
    tensors = {key: value for key, value in loaded.items() if isinstance(value, torch.Tensor)}
    if tensors:
        return tensors
    inner = next((loaded[key] for key in _MODELS if isinstance(loaded.get(key), Mapping)), None)
    return None if inner is None else _tensors(inner)
