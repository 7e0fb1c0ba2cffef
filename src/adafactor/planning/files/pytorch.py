"""PyTorch's ``.pt``, ``.pth`` and ``.bin``: a state dict, read by PyTorch in the child of ``sandbox``."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from adafactor.core.errors import Refused, message
from adafactor.core.untrusted import cut, member
from adafactor.planning.parameters import Parameter

MAX_PICKLE = 100_000_000
#: Where training programs put the model's state in a checkpoint.
_MODELS = ("state_dict", "model_state_dict", "model", "module", "params", "weights")


def read(path: Path) -> list[Parameter]:
    """The tensors of a state dict that ``torch.save`` wrote; their memory is mapped and never touched."""
    with zipfile.ZipFile(path) as archive:
        member(archive, "/data.pkl", cut(path.name), MAX_PICKLE)
    import torch

    loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    tensors = _tensors(loaded)
    if tensors is None:
        rule, remedy = f"a state dict, or one under {', '.join(_MODELS)}", "Save model.state_dict() by itself."
        raise Refused(message(cut(path.name), rule, type(loaded).__name__, remedy))
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
    if not isinstance(loaded, Mapping):
        return None
    tensors = {key: value for key, value in loaded.items() if hasattr(value, "untyped_storage")}
    inner = next((loaded[key] for key in _MODELS if isinstance(loaded.get(key), Mapping)), None)
    return tensors or (None if inner is None else _tensors(inner))
