"""The msgpack files of ``flax.serialization``, read and written without Flax, and without trusting their lengths."""

from __future__ import annotations

import math
from typing import Any

import msgpack
import numpy as np

from adafactor.core.errors import Refused, message
from adafactor.core.files import PathLike, replacing
from adafactor.core.untrusted import reading

_ARRAY, _COMPLEX, _SCALAR = 1, 2, 3
_CHUNKED = "__msgpack_chunked_array__"
_CHUNK = 1 << 30  # bytes; Flax splits larger arrays, because msgpack ends at 2 GiB


def read(path: PathLike) -> Any:
    """Nested dictionaries of arrays and numbers.

    Raises:
        Refused: the file is damaged, or something else.
    """
    with reading(path, "a msgpack file of flax.serialization"):
        with open(path, "rb") as file:
            data = file.read()
        return msgpack.unpackb(data, ext_hook=_unpack, object_hook=_whole, raw=False, strict_map_key=True)


def write(tree: Any, path: PathLike) -> None:
    """Write nested dictionaries of arrays and numbers; the file is there whole or not at all."""
    with replacing(path) as new, open(new, "wb") as file:
        file.write(msgpack.packb(tree, default=_pack, strict_types=True))


def _unpack(code: int, data: bytes) -> Any:
    if code not in (_ARRAY, _SCALAR):
        raise ValueError(f"it holds a value of the unknown kind {code}")
    shape, name, buffer = msgpack.unpackb(data, raw=True)
    name = name.decode()
    if name == "bfloat16":
        import ml_dtypes  # noqa: F401 - NumPy learns the dtype from it
    dtype = np.dtype(name)
    if dtype.kind not in "fiubV" or (dtype.kind == "V" and name != "bfloat16"):
        raise ValueError(f"it holds an array of {name}")
    if not all(type(n) is int and n >= 0 for n in shape) or math.prod(shape) * dtype.itemsize != len(buffer):
        raise ValueError(f"an array of shape {tuple(shape)} and {name} must have its bytes, got {len(buffer)}")
    array = np.frombuffer(buffer, dtype).reshape(shape)
    return array if code == _ARRAY else array[()]


def _whole(tree: dict[str, Any]) -> Any:
    """An array put together from its chunks."""
    if _CHUNKED not in tree:
        return tree
    shape = [int(tree["shape"][str(axis)]) for axis in range(len(tree["shape"]))]
    chunks = [tree["chunks"][str(number)] for number in range(len(tree["chunks"]))]
    if math.prod(shape) != sum(chunk.size for chunk in chunks):
        raise ValueError(f"the chunks of an array of shape {tuple(shape)} must have its elements")
    return np.concatenate([chunk.reshape(-1) for chunk in chunks]).reshape(shape)


def _pack(value: Any) -> msgpack.ExtType | dict[str, Any]:
    if not isinstance(value, np.ndarray | np.generic):
        raise Refused(message("a leaf of the tree", "an array or a number", type(value).__name__, "Convert it."))
    array = np.asarray(value)
    if array.nbytes > _CHUNK:
        flat, step = array.reshape(-1), _CHUNK // array.itemsize
        chunks = {str(number): flat[start : start + step] for number, start in enumerate(range(0, flat.size, step))}
        return {_CHUNKED: True, "shape": {str(axis): n for axis, n in enumerate(array.shape)}, "chunks": chunks}
    content = msgpack.packb((array.shape, array.dtype.name, array.tobytes()), use_bin_type=True)
    return msgpack.ExtType(_ARRAY if isinstance(value, np.ndarray) else _SCALAR, content)
