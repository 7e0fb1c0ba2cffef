"""``.safetensors``: eight bytes of length, a JSON header, the tensors. Only the header is read.

https://github.com/huggingface/safetensors describes the format, its limits included: a header has at most 100 MB, no
key twice, and describes every byte after it exactly once.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from adafactor.hyperparameters import message
from adafactor.planning.files.access import Unreadable, parse, regular, shape_of
from adafactor.planning.parameters import MAX_TENSORS, Parameter, cut

MAX_HEADER = 100_000_000

DTYPES = {
    "BOOL": "bool", "U8": "uint8", "I8": "int8", "I16": "int16", "U16": "uint16", "I32": "int32", "U32": "uint32",
    "I64": "int64", "U64": "uint64", "F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64",
    "C64": "complex64", "F8_E4M3": "float8", "F8_E5M2": "float8", "F8_E8M0": "float8", "F8_E4M3FNUZ": "float8",
    "F8_E5M2FNUZ": "float8", "F6_E2M3": "float6", "F6_E3M2": "float6", "F4": "float4",
}  # fmt: skip


def read(path: Path) -> list[Parameter]:
    """The tensors of a file, in the order of their bytes."""
    name, damaged = cut(path.name), "The file is damaged or not safetensors."
    size = regular(path)
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > size - 8:
                raise Unreadable(message(f"the header of {name}", "inside the file", f"{length} bytes", damaged))
            if length > MAX_HEADER:
                raise Unreadable(message(f"the header of {name}", f"at most {MAX_HEADER:,} bytes", length, damaged))
            data = file.read(length)
    except OSError as error:
        raise Unreadable(message(name, f"readable ({error.strerror})", cut(str(path)), "Check its rights.")) from None
    if data[:1] != b"{":
        raise Unreadable(message(f"the header of {name}", "a JSON object", cut(repr(data[:8])), damaged))
    header = parse(data, f"the header of {name}")
    header.pop("__metadata__", None)
    if len(header) > MAX_TENSORS:
        raise Unreadable(message(f"the tensors of {name}", f"at most {MAX_TENSORS:,}", len(header), damaged))
    entries = [_entry(key, value, name) for key, value in header.items()]
    end = 0
    for start, stop, parameter in sorted(entries, key=lambda entry: entry[:2]):
        if start != end:
            rule = f"where the tensor before it ends ({end})"
            raise Unreadable(message(f"the first byte of {cut(parameter.name)}", rule, start, damaged))
        end = stop
    if end != size - 8 - length:
        rule = f"{end:,} bytes after its header, as that says"
        raise Unreadable(message(name, rule, f"{size - 8 - length:,}", "It is cut short, or not safetensors."))
    return [parameter for _, _, parameter in sorted(entries, key=lambda entry: entry[:2])]


def _entry(key: str, value: Any, name: str) -> tuple[int, int, Parameter]:
    """First byte, last byte and tensor of one entry of a header."""
    damaged = "The file is damaged or not safetensors."
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        rule = "an object of dtype, shape and data_offsets"
        raise Unreadable(message(f"{cut(key)} in {name}", rule, cut(value), damaged))
    dtype = value["dtype"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise Unreadable(message(f"the dtype of {cut(key)}", f"one of {', '.join(DTYPES)}", cut(dtype), damaged))
    try:
        parameter = Parameter(key, shape_of(value["shape"], key), DTYPES[dtype])
    except ValueError as error:
        raise Unreadable(str(error)) from None
    offsets = value["data_offsets"]
    if not (isinstance(offsets, list) and len(offsets) == 2 and all(type(n) is int for n in offsets)):
        raise Unreadable(message(f"the data_offsets of {cut(key)}", "two integers", cut(offsets), damaged))
    start, stop = offsets
    if start < 0 or stop - start != parameter.nbytes:
        rule = f"{parameter.nbytes} bytes apart, as its shape and dtype say"
        raise Unreadable(message(f"the data_offsets of {cut(key)}", rule, cut(offsets), damaged))
    return start, stop, parameter
