"""``.safetensors``: eight bytes of length, a JSON header, the tensors. Only the header is read.

https://github.com/huggingface/safetensors describes the format, its limits included: a header has at most 100 MB, no
key twice, and describes every byte after it exactly once.

The header is read entry by entry: 100 MB of JSON that is something else would otherwise become gigabytes of objects.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from json.decoder import scanstring  # type: ignore[attr-defined]
from pathlib import Path
from typing import Any

from adafactor.core.errors import Refused, message
from adafactor.core.factoring import Shape
from adafactor.core.untrusted import BITS, MAX_TENSORS, check_size, cut, decode, opened, parse_text, shape_of

MAX_HEADER = 100_000_000
DAMAGED = "The file is damaged or not safetensors."

DTYPES = {
    "BOOL": "bool", "U8": "uint8", "I8": "int8", "I16": "int16", "U16": "uint16", "I32": "int32", "U32": "uint32",
    "I64": "int64", "U64": "uint64", "F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64",
    "C64": "complex64", "F8_E4M3": "float8", "F8_E5M2": "float8", "F8_E8M0": "float8", "F8_E4M3FNUZ": "float8",
    "F8_E5M2FNUZ": "float8", "F6_E2M3": "float6", "F6_E3M2": "float6", "F4": "float4",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Tensor:
    """A tensor of a file: ``dtype`` is a name in ``BITS``; its bytes, counted from the end of the header."""

    name: str
    shape: Shape
    dtype: str
    start: int
    stop: int


def header(path: Path, largest: int = MAX_HEADER, wanted: str = "") -> tuple[list[Tensor], str | None]:
    """The tensors of a file in the order of their bytes, and the ``wanted`` entry of its metadata.

    Args:
        largest: bytes of a header that are read at most.

    Raises:
        Refused: the file is damaged, or something else.
    """
    name = cut(path.name)
    with opened(path) as (file, size):
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            raise Refused(message(f"the header of {name}", "inside the file", f"{length} bytes", DAMAGED))
        if length > largest:
            raise Refused(message(f"the header of {name}", f"at most {largest:,} bytes", length, DAMAGED))
        data = file.read(length)
    if data[:1] != b"{":
        raise Refused(message(f"the header of {name}", "a JSON object", cut(repr(data[:8])), DAMAGED))
    tensor_of: dict[str, Tensor] = {}
    reader = _Header(data, f"the header of {name}", wanted)
    for key, value in reader:
        if key in tensor_of:
            raise Refused(message(f"a key in the header of {name}", "unique", cut(key), DAMAGED))
        if len(tensor_of) == MAX_TENSORS:
            raise Refused(message(f"the tensors of {name}", f"at most {MAX_TENSORS:,}", "more", DAMAGED))
        tensor_of[key] = _tensor(key, value, name)
    tensors = sorted(tensor_of.values(), key=lambda tensor: (tensor.start, tensor.stop))
    end = 0
    for tensor in tensors:
        if tensor.start != end:
            rule = f"where the tensor before it ends ({end})"
            raise Refused(message(f"the first byte of {cut(tensor.name)}", rule, tensor.start, DAMAGED))
        end = tensor.stop
    if end != size - 8 - length:
        rule = f"{end:,} bytes after its header, as that says"
        raise Refused(message(name, rule, f"{size - 8 - length:,}", "It is cut short, or not safetensors."))
    return tensors, reader.metadata


#: What may stand between two words of JSON; the description of a tensor, which holds no braces and fits on a page.
_SPACE, _ENTRY = re.compile(r"[ \t\r\n]*"), re.compile(r"\{[^{}]{0,4096}\}")


class _Header:
    """A header as its reader goes through it: an iterable of names and descriptions of tensors."""

    def __init__(self, data: bytes, name: str, wanted: str) -> None:
        self._text, self._name, self._at = decode(data, name), name, 0
        self._wanted = wanted
        self.metadata: str | None = None

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        for key in self._keys():
            if key == "__metadata__":
                for word in self._keys():
                    text = self._string()
                    self.metadata = text if word == self._wanted else self.metadata
                continue
            match = _ENTRY.match(self._text, self._skip())
            if match is None:
                raise self._error(f"an object of dtype, shape and data_offsets for {cut(key)}")
            self._at = match.end()
            yield key, parse_text(match[0], f"{cut(key)} in {self._name}")
        if self._skip() != len(self._text):
            raise self._error("one JSON object and no more")

    def _keys(self) -> Iterator[str]:
        """The keys of the object that begins here. Who takes a key reads its value before the next."""
        self._mark("{")
        if self._text[self._skip() : self._at + 1] == "}":
            self._at += 1
            return
        while True:
            key = self._string()
            self._mark(":")
            yield key
            if self._mark(",}") == "}":
                return

    def _string(self) -> str:
        self._mark('"')
        try:
            text, self._at = scanstring(self._text, self._at, True)
        except ValueError as error:
            raise self._error(f"JSON ({cut(str(error))})") from None
        return str(text)

    def _mark(self, allowed: str) -> str:
        mark = self._text[self._skip() : self._at + 1]
        if not mark or mark not in allowed:
            raise self._error(f"a JSON object, with {' or '.join(allowed)} at character {self._at}")
        self._at += 1
        return mark

    def _skip(self) -> int:
        """Pass over white space; the place after it."""
        match = _SPACE.match(self._text, self._at)
        assert match is not None
        self._at = match.end()
        return self._at

    def _error(self, rule: str) -> Refused:
        got = cut(self._text[self._at : self._at + 20])
        return Refused(message(self._name, rule, got, DAMAGED))


def _tensor(key: str, value: Any, name: str) -> Tensor:
    """One entry of a header."""
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        rule = "an object of dtype, shape and data_offsets"
        raise Refused(message(f"{cut(key)} in {name}", rule, cut(value), DAMAGED))
    dtype = value["dtype"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise Refused(message(f"the dtype of {cut(key)}", f"one of {', '.join(DTYPES)}", cut(dtype), DAMAGED))
    shape = shape_of(value["shape"], key)
    nbytes = check_size(key, shape, BITS[DTYPES[dtype]])
    offsets = value["data_offsets"]
    if not (isinstance(offsets, list) and len(offsets) == 2 and all(type(n) is int for n in offsets)):
        raise Refused(message(f"the data_offsets of {cut(key)}", "two integers", cut(offsets), DAMAGED))
    start, stop = offsets
    if start < 0 or stop - start != nbytes:
        rule = f"{nbytes} bytes apart, as its shape and dtype say"
        raise Refused(message(f"the data_offsets of {cut(key)}", rule, cut(offsets), DAMAGED))
    return Tensor(key, shape, DTYPES[dtype], start, stop)
