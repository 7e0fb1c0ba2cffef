"""Keras's ``.keras`` and ``.weights.h5``: an HDF5 file of variables, read by h5py in the child of ``sandbox``.

A ``.keras`` file also says which layers are trainable, and its batch normalizations which variables are not.
"""

from __future__ import annotations

import io
import stat
import struct
import zipfile
from pathlib import Path
from typing import Any, BinaryIO

from adafactor.core.errors import Refused, message
from adafactor.core.untrusted import cut, parse
from adafactor.planning.files.keras_layers import Layer, layers
from adafactor.planning.parameters import Parameter

MAX_CONFIG = 32_000_000
WEIGHTS = "model.weights.h5"


def open_archive(path: Path) -> list[Parameter]:
    """The variables of a ``.keras`` file. HDF5 is read where it lies in the archive, which Keras does not compress."""
    name, damaged = cut(path.name), "The file is damaged or not Keras's."
    with path.open("rb") as file:
        try:
            archive = zipfile.ZipFile(file)
            config = parse(_member(archive, "config.json", name), f"config.json in {name}")
        except (zipfile.BadZipFile, RuntimeError, NotImplementedError, EOFError, OSError, ValueError) as error:
            if isinstance(error, Refused):
                raise
            raise Refused(message(name, f"a zip archive ({cut(str(error))})", "something else", damaged)) from None
        info = _only(archive, WEIGHTS, name)
        if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
            remedy = "Save it again with model.save."
            raise Refused(message(f"{WEIGHTS} in {name}", "stored as it is", "compressed or encrypted", remedy))
        file.seek(info.header_offset)
        local = file.read(30)
        if len(local) < 30 or local[:4] != b"PK\3\4":
            raise Refused(message(f"{WEIGHTS} in {name}", "where the archive says", info.header_offset, damaged))
        start = info.header_offset + 30 + sum(struct.unpack("<HH", local[26:30]))
        if start + info.file_size > file.seek(0, io.SEEK_END):
            raise Refused(message(f"{WEIGHTS} in {name}", "inside the archive", info.file_size, damaged))
        return _variables(Window(file, start, info.file_size), name, layers(config))


def open_weights(path: Path) -> list[Parameter]:
    """The variables of a ``.weights.h5`` file."""
    with path.open("rb") as file:
        return _variables(file, cut(path.name), {})


class Window(io.RawIOBase):
    """A part of a file as a file of its own."""

    def __init__(self, file: BinaryIO, start: int, size: int) -> None:
        self._file, self._start, self._size, self._at = file, start, size, 0

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = max(0, offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence])
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        count = max(0, min(len(view), self._size - self._at))
        self._file.seek(self._start + self._at)
        data = self._file.read(count)
        view[: len(data)] = data
        self._at += len(data)
        return len(data)


def _only(archive: zipfile.ZipFile, member: str, name: str) -> zipfile.ZipInfo:
    """The one member of a name; two would let one reader see what another does not."""
    members = [info for info in archive.infolist() if info.filename == member]
    if len(members) != 1 or stat.S_ISLNK(members[0].external_attr >> 16):
        remedy = "The file is damaged or not Keras's."
        raise Refused(message(f"{member} in {name}", "there once, as a file", f"{len(members)} times", remedy))
    return members[0]


def _member(archive: zipfile.ZipFile, member: str, name: str) -> bytes:
    info = _only(archive, member, name)
    if info.file_size > MAX_CONFIG:
        rule = f"at most {MAX_CONFIG:,} bytes"
        raise Refused(message(f"{member} in {name}", rule, info.file_size, "The file is damaged."))
    return archive.read(info)


def _variables(file: Any, name: str, known: dict[str, Layer]) -> list[Parameter]:
    try:
        import h5py
    except ImportError:
        raise Refused(f"Reading {name} needs h5py. Install with: pip install h5py") from None
    groups: dict[str, list[tuple[int, Parameter]]] = {}

    def visit(path: str, item: Any) -> None:
        if not isinstance(item, h5py.Dataset) or path.startswith("optimizer/"):
            return
        dtype = str(item.attrs.get("dtype", "") or item.dtype.name)
        if item.shape is None or item.dtype.kind not in "biufcV":
            return
        group, _, key = path.rpartition("/")
        dtype = "float8" if dtype.startswith("float8") else dtype
        place = int(key) if key.isascii() and key.isdigit() and len(key) < 10 else 0
        shape = tuple(int(n) for n in item.shape)
        groups.setdefault(group, []).append((place, Parameter(path, shape, dtype)))

    parameters: list[Parameter] = []
    try:
        with h5py.File(file, "r") as opened:
            opened.visititems(visit)
            for group, members in groups.items():
                layer = _layer_of(group, opened, known)
                members.sort(key=lambda member: member[0])
                for position, (_, p) in enumerate(members):
                    parameters.append(Parameter(p.name, p.shape, p.dtype, layer.trains(position, len(members))))
                for matrix, shape in zip("ab", layer.adapters(members[0][1].shape), strict=False):
                    parameters.append(Parameter(f"{group}/lora_{matrix}", shape, "float32", layer.trainable))
    except (OSError, RuntimeError, KeyError, TypeError, ValueError) as error:
        remedy = "The file is damaged or not Keras's."
        raise Refused(message(name, f"HDF5 as Keras writes it ({cut(str(error))})", "something else", remedy)) from None
    return parameters


def _layer_of(group: str, opened: Any, known: dict[str, Layer]) -> Layer:
    """The layer whose variables are in a group ``.../vars``: its own words, or those of the layer around it."""
    path = group
    while path:
        layer = known.get(str(opened[path].attrs.get("name", ""))) if path in opened else None
        if layer is not None:
            return layer if path == group else Layer(trainable=layer.trainable)
        outer = path.removesuffix("/vars").rpartition("/")[0]
        path = f"{outer}/vars" if outer else ""
    return Layer()
