"""Model files, read as far as shapes and dtypes: no weight is loaded, and no framework where its format can do without.

Every file is taken for hostile: sizes are checked before they are believed, and what does not fit ends in one
sentence (``ValueError``).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

from adafactor.core.errors import Refused, message
from adafactor.core.safetensors import header
from adafactor.core.untrusted import MAX_TENSORS, content, cut, inside, parse, regular
from adafactor.planning.files import sandbox, shapes
from adafactor.planning.parameters import Parameter, check_total

__all__ = ["SUFFIXES", "read"]

#: What a folder as Hugging Face lays it out holds: one file of weights, or an index that names several. In the order in
#: which transformers looks for them.
NAMES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "diffusion_pytorch_model.safetensors",
    "diffusion_pytorch_model.safetensors.index.json",
    "adapter_model.safetensors",
)
MAX_INDEX = 32_000_000


def read(path: str | os.PathLike[str]) -> list[Parameter]:
    """The tensors of a model file, or of a folder as Hugging Face lays it out.

    Args:
        path: a file with a suffix of ``SUFFIXES``, or a folder with one of ``NAMES``.

    Raises:
        Refused: there is no such file, or its content is not what its suffix says.
    """
    path = Path(path)
    if path.is_dir():
        name = next((name for name in NAMES if (path / name).is_file()), None)
        if name is None:
            remedy = "Give the file itself."
            raise Refused(message("the folder", f"one that holds {', '.join(NAMES)}", str(path), remedy))
        path = path / name if name.endswith(".json") else inside(path, name, "the folder")
    parameters = _read(path)
    if not parameters:
        raise Refused(message(path.name, "a file with tensors", "none", "Check that it is the right file."))
    return parameters


def opened_with(path: Path) -> list[Path]:
    """The files that `read` may open besides ``path``: weights and indices in a folder, or next to an index."""
    index = path.name.lower().endswith(".index.json")
    folder = path if path.is_dir() else path.parent if index and path.is_file() else None
    return [] if folder is None else [f for f in folder.iterdir() if f.name.lower().endswith((".index.json", *_NAMED))]


def _read(path: Path) -> list[Parameter]:
    suffix = max((suffix for suffix in SUFFIXES if path.name.lower().endswith(suffix)), key=len, default=None)
    if suffix is None:
        rule = f"a folder, or a file that ends in {', '.join(SUFFIXES)}"
        raise Refused(message("the model", rule, str(path), "Or give shapes: 4096x4096*32 4096."))
    regular(path)
    return SUFFIXES[suffix](path)


def _safetensors(path: Path) -> list[Parameter]:
    """In the order of their bytes."""
    return [Parameter(tensor.name, tensor.shape, tensor.dtype) for tensor in header(path)[0]]


def _index(path: Path) -> list[Parameter]:
    """The tensors that an index names, each from the file that it says."""
    source = cut(path.name)
    index = parse(content(path, MAX_INDEX), source)
    weights = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weights, dict) or not weights:
        raise Refused(message(f"weight_map in {source}", "an object of tensors and files", cut(weights), "Check it."))
    if len(weights) > MAX_TENSORS:
        raise Refused(message(f"weight_map in {source}", f"at most {MAX_TENSORS:,} tensors", len(weights), "Check it."))
    wanted: dict[str, set[str]] = {}
    for tensor, file in weights.items():
        wanted.setdefault(inside(path.parent, file, source).name, set()).add(tensor)
    parameters: list[Parameter] = []
    for file, names in wanted.items():
        if not file.endswith(_NAMED):
            rule = "a .safetensors, .bin, .pt or .pth file"
            raise Refused(message("a file named in the index", rule, cut(file), "Give the file itself."))
        here = [parameter for parameter in _read(path.parent / file) if parameter.name in names]
        missing = names - {parameter.name for parameter in here}
        if missing:
            rule = f"in {cut(file)}, as {source} says"
            raise Refused(message(f"{cut(min(missing))}", rule, "nothing there", "Fetch the folder again."))
        parameters += here
    check_total(parameters)
    return parameters


_PYTORCH = partial(sandbox.read, "pytorch")
#: How a file of a name is read. The longest suffix that fits counts.
SUFFIXES: dict[str, Callable[[Path], list[Parameter]]] = {
    ".safetensors": _safetensors,
    ".index.json": _index,
    ".weights.h5": partial(sandbox.read, "weights_h5"),
    ".keras": partial(sandbox.read, "keras"),
    ".pt": _PYTORCH,
    ".pth": _PYTORCH,
    ".bin": _PYTORCH,
    ".json": shapes.read_json,
    ".txt": shapes.read_text,
}
#: Those of them that an index may name.
_NAMED = (".safetensors", ".bin", ".pt", ".pth")
