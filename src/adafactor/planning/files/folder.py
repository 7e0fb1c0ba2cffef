"""A folder as Hugging Face lays it out: one file of weights, or an index that names several."""

from __future__ import annotations

from pathlib import Path

from adafactor.core.errors import Refused, message
from adafactor.core.safetensors import header
from adafactor.core.untrusted import MAX_TENSORS, content, cut, inside, parse
from adafactor.planning.files import sandbox
from adafactor.planning.parameters import Parameter, check_total

#: In the order in which transformers looks for them.
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


def read(folder: Path) -> list[Parameter]:
    """The tensors of the first of ``NAMES`` that is there."""
    name = next((name for name in NAMES if (folder / name).is_file()), None)
    if name is None:
        remedy = "Give the file itself."
        raise Refused(message("the folder", f"one that holds {', '.join(NAMES)}", str(folder), remedy))
    return read_index(folder / name) if name.endswith(".json") else _read(inside(folder, name, "the folder"))


def read_safetensors(path: Path) -> list[Parameter]:
    """The tensors of a ``.safetensors`` file, in the order of their bytes."""
    return [Parameter(tensor.name, tensor.shape, tensor.dtype) for tensor in header(path)[0]]


def read_index(path: Path) -> list[Parameter]:
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
        here = [parameter for parameter in _read(path.parent / file) if parameter.name in names]
        missing = names - {parameter.name for parameter in here}
        if missing:
            rule = f"in {cut(file)}, as {source} says"
            raise Refused(message(f"{cut(min(missing))}", rule, "nothing there", "Fetch the folder again."))
        parameters += here
    check_total(parameters)
    return parameters


def _read(path: Path) -> list[Parameter]:
    if path.name.endswith(".safetensors"):
        return read_safetensors(path)
    if path.name.endswith((".bin", ".pt", ".pth")):
        return sandbox.read("pytorch", path)
    rule = "a .safetensors, .bin, .pt or .pth file"
    raise Refused(message("a file named in the index", rule, cut(path.name), "Give the file itself."))
