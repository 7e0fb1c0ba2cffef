"""Files of other people: only regular ones, only as far as a limit, JSON without surprises, archives that lead nowhere.

Whatever goes wrong with them ends in one sentence.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import stat
import struct
import zipfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from adafactor.core.errors import Refused, message
from adafactor.core.files import PathLike

#: Bits of one number.
BITS = {
    "bool": 8, "uint8": 8, "int8": 8, "int16": 16, "uint16": 16, "int32": 32, "uint32": 32, "int64": 64, "uint64": 64,
    "float4": 4, "float6": 6, "float8": 8, "float16": 16, "bfloat16": 16, "float32": 32, "float64": 64,
    "complex64": 64, "complex128": 128,
}  # fmt: skip
#: More than any model has; they keep a hostile file from filling the memory with names, or a figure from overflowing.
MAX_TENSORS, MAX_RANK, MAX_BYTES = 500_000, 64, 2**63 - 1


#: What Git leaves in the place of a large file that it has not fetched.
_POINTER = b"version https://git-lfs.github.com/"


def regular(path: Path, what: str = "the model") -> int:
    """The size of a regular file; anything else (a pipe would wait for ever) is refused."""
    try:
        status = path.stat()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        rule = f"a file that can be read ({reason})"
        raise Refused(message(what, rule, cut(str(path)), "Check the path.")) from None
    if not stat.S_ISREG(status.st_mode):
        raise Refused(message(what, "a regular file", cut(str(path)), "Copy it to a file first."))
    if status.st_size < 1024 and os.access(path, os.R_OK) and path.read_bytes().startswith(_POINTER):
        raise Refused(message(what, "the file itself", "a pointer of Git LFS", "Fetch it with git lfs pull."))
    return status.st_size


@contextlib.contextmanager
def opened(path: Path) -> Iterator[tuple[BinaryIO, int]]:
    """A regular file to be read, and its size."""
    size = regular(path)
    try:
        with path.open("rb") as file:
            yield file, size
    except OSError as error:
        rule = f"readable ({error.strerror})"
        raise Refused(message(cut(path.name), rule, cut(str(path)), "Check its rights.")) from None


def content(path: Path, limit: int) -> bytes:
    """All of a small file."""
    with opened(path) as (file, size):
        if size > limit:
            raise Refused(message(cut(path.name), f"at most {limit:,} bytes long", size, "Check the file."))
        return file.read()


def decode(data: bytes, name: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        got = f"something else at byte {error.start}"
        raise Refused(message(name, "text in UTF-8", got, "The file is damaged.")) from None


def parse(data: bytes, name: str) -> Any:
    """JSON in UTF-8, without duplicate keys or constants that are not JSON."""
    return parse_text(decode(data, name), name)


def parse_text(text: str, name: str) -> Any:
    def pairs(listed: list[tuple[str, Any]]) -> dict[str, Any]:
        made = dict(listed)
        if len(made) != len(listed):
            twice = Counter(key for key, _ in listed).most_common(1)[0][0]
            raise Refused(message(f"a key in {name}", "unique", cut(twice), "The file is damaged."))
        return made

    def constant(word: str) -> Any:
        raise Refused(message(f"a number in {name}", "finite", word, "The file is damaged."))

    try:
        return json.loads(text, object_pairs_hook=pairs, parse_constant=constant)
    except Refused:
        raise
    except (ValueError, RecursionError) as error:
        rule = f"JSON ({cut(str(error))})"
        raise Refused(message(name, rule, cut(text[:20]), "The file is damaged.")) from None


def shape_of(value: Any, name: str) -> tuple[int, ...]:
    """A JSON list of numbers as a shape; ``Parameter`` checks the numbers."""
    if not isinstance(value, list) or not all(type(n) is int for n in value):
        raise Refused(message(f"the shape of {cut(name)}", "a list of integers", cut(value), "Check the file."))
    return tuple(value)


def inside(folder: Path, name: object, source: str) -> Path:
    """The file of a folder that an index names.

    A name with a path in it is refused, and so is a link to somewhere else. Links of Hugging Face's cache lead from
    ``snapshots/<revision>`` to ``blobs`` beside it, which is allowed.
    """
    plain = isinstance(name, str) and name not in ("", ".", "..") and not set(name) & {"/", "\\", "\0", ":"}
    if not isinstance(name, str) or not plain:
        remedy = "Do not trust this folder."
        raise Refused(message(f"a file named in {source}", "the name of a file beside it", cut(name), remedy))
    path = folder / name
    regular(path)
    places = [folder.resolve()]
    if folder.absolute().parent.name == "snapshots":
        places.append((folder.absolute().parent.parent / "blobs").resolve())
    if not any(os.path.commonpath([place, path.resolve()]) == str(place) for place in places):
        remedy = "Do not trust this folder, or replace the link by the file."
        raise Refused(message(f"a file named in {source}", "inside its folder", cut(name), remedy))
    return path


def check_size(name: str, shape: Sequence[int], bits: int) -> int:
    """Bytes of a tensor of a shape.

    Raises:
        Refused: it is no tensor's shape, or one that no memory holds.
    """
    what = f"the shape of {cut(name)}"
    if len(shape) > MAX_RANK:
        raise Refused(message(what, f"of rank <= {MAX_RANK}", len(shape), "No framework goes further."))
    if not all(type(n) is int and 0 <= n <= MAX_BYTES for n in shape):
        raise Refused(message(what, "integers >= 0 and < 2**63", cut(list(shape)), "Check the file."))
    nbytes = -(-math.prod(shape) * bits // 8)
    if nbytes > MAX_BYTES:
        raise Refused(message(what, "of fewer than 2**63 bytes", cut(list(shape)), "Check the file."))
    return nbytes


def member(archive: zipfile.ZipFile, name: str, source: str, most: int = MAX_BYTES) -> zipfile.ZipInfo:
    """The one file of a name in an archive, "/NAME" in any folder. Of two, readers may differ in which they see."""
    members = [
        info
        for info in archive.infolist()
        if info.filename == name or (name[0] == "/" and info.filename.endswith(name))
    ]
    remedy = "The file is damaged, or something else."
    if len(members) != 1 or stat.S_ISLNK(members[0].external_attr >> 16):
        raise Refused(message(f"{name} in {source}", "there once, as a file", f"{len(members)} times", remedy))
    if members[0].file_size > most:
        raise Refused(message(f"{name} in {source}", f"at most {most:,} bytes", members[0].file_size, remedy))
    return members[0]


class Window(io.RawIOBase):
    """A part of a file as a file of its own."""

    def __init__(self, file: BinaryIO, start: int, size: int) -> None:
        self._file, self._start, self._size, self._at = file, start, size, 0

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = max(0, offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence])
        return self._at

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        self._file.seek(self._start + self._at)
        data = self._file.read(max(0, min(len(view), self._size - self._at)))
        view[: len(data)] = data
        self._at += len(data)
        return len(data)


def stored(file: BinaryIO, info: zipfile.ZipInfo, source: str) -> Window:
    """A file where it lies in an archive, which holds it as it is."""
    what, damaged = f"{info.filename} in {source}", "The file is damaged, or something else."
    if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
        raise Refused(message(what, "stored as it is", "compressed or encrypted", "Save it again with model.save."))
    file.seek(info.header_offset)
    local = file.read(30)
    if len(local) < 30 or local[:4] != b"PK\3\4":
        raise Refused(message(what, "where the archive says", info.header_offset, damaged))
    start = info.header_offset + 30 + sum(struct.unpack("<HH", local[26:30]))
    if start + info.file_size > file.seek(0, io.SEEK_END):
        raise Refused(message(what, "inside the archive", info.file_size, damaged))
    return Window(file, start, info.file_size)


def check_zip(path: PathLike) -> list[str]:
    """The names in an archive.

    PyTorch and Keras store without compression, so an archive can hold no more than its own length.

    Raises:
        ValueError: a name leads out of the archive, appears twice, or is a link; an entry is compressed, or its length
            or checksum is not what the archive says.
    """
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        for entry in archive.infolist():
            name = entry.filename
            if name.startswith(("/", "\\")) or ".." in PurePosixPath(name.replace("\\", "/")).parts or ":" in name:
                raise ValueError(f"its entry {name!r} leads out of the archive")
            if stat.S_ISLNK(entry.external_attr >> 16):
                raise ValueError(f"its entry {name!r} is a link")
            if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size:
                raise ValueError(f"its entry {name!r} is compressed")
        if len(set(names)) != len(names):
            raise ValueError("it has two entries of one name")
        if sum(entry.file_size for entry in archive.infolist()) > archive.fp.seek(0, 2):  # type: ignore[union-attr]
            raise ValueError("its entries overlap")
        damaged = archive.testzip()
        if damaged is not None:
            raise ValueError(f"the checksum of its entry {damaged!r} is wrong")
    return names


@contextlib.contextmanager
def reading(path: object, what: str) -> Iterator[None]:
    """Refuse in one sentence whatever goes wrong while a file is read: a stranger's file can make any library raise.

    Args:
        what: what the file should be, for the sentence.
    """
    try:
        yield
    except Refused:
        raise
    except ImportError as error:
        remedy = "Install what the format needs with: pip install 'adafactor[convert]'"
        raise ImportError(f"{path} cannot be read without {error.name}. {remedy}.", name=error.name) from error
    except Exception as error:
        if isinstance(error, FileNotFoundError) and not os.path.exists(str(path)):
            raise FileNotFoundError(message("the file", "there", str(path), "Check the name.")) from None
        cause = " ".join(str(error).split())[:200] or type(error).__name__
        raise Refused(f"{path} is not {what} that can be read: {cause.rstrip('.')}. Save it again.") from error


def cut(value: object, most: int = 80) -> str:
    """A value of a file as a message shows it: no longer than a line."""
    text = value if isinstance(value, str) else repr(value)
    return text if len(text) <= most else f"{text[:most]}…"
