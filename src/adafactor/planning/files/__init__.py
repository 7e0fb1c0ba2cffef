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
from adafactor.core.untrusted import regular
from adafactor.planning.files import folder, sandbox, shapes
from adafactor.planning.parameters import Parameter

__all__ = ["SUFFIXES", "read"]


_PYTORCH = partial(sandbox.read, "pytorch")
#: How a file of a name is read. The longest suffix that fits counts.
SUFFIXES: dict[str, Callable[[Path], list[Parameter]]] = {
    ".safetensors": folder.read_safetensors,
    ".index.json": folder.read_index,
    ".weights.h5": partial(sandbox.read, "weights_h5"),
    ".keras": partial(sandbox.read, "keras"),
    ".pt": _PYTORCH,
    ".pth": _PYTORCH,
    ".bin": _PYTORCH,
    ".json": shapes.read_json,
    ".txt": shapes.read_text,
}


def read(path: str | os.PathLike[str]) -> list[Parameter]:
    """The tensors of a model file, or of a folder as Hugging Face lays it out.

    Args:
        path: a file with a suffix of ``SUFFIXES``, or a folder with one of ``folder.NAMES``.

    Raises:
        Refused: there is no such file, or its content is not what its suffix says.
    """
    path = Path(path)
    if path.is_dir():
        return folder.read(path)
    suffix = max((suffix for suffix in SUFFIXES if path.name.lower().endswith(suffix)), key=len, default=None)
    if suffix is None:
        rule = f"a folder, or a file that ends in {', '.join(SUFFIXES)}"
        raise Refused(message("the model", rule, str(path), "Or give shapes: 4096x4096*32 4096."))
    regular(path)
    parameters = SUFFIXES[suffix](path)
    if not parameters:
        raise Refused(message(path.name, "a file with tensors", "none", "Check that it is the right file."))
    return parameters
