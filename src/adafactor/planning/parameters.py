"""What a model is made of, as far as memory is concerned: names, shapes, dtypes. Plain data."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import cached_property
from typing import Any

from adafactor.core.errors import message
from adafactor.core.factoring import Shape
from adafactor.core.untrusted import BITS, MAX_BYTES, MAX_TENSORS, check_size, cut

#: What an optimizer trains. The rest is counted as weights without gradient and state.
TRAINED = ("float32", "bfloat16", "float16", "float64")


@dataclass(frozen=True)
class Parameter:
    """One tensor of a model.

    Args:
        name: its place in the model.
        shape: rank 0 to 64.
        dtype: a name in ``BITS``.
        trained: whether it has a gradient and optimizer state.

    Raises:
        ValueError: the shape or the dtype is impossible.
    """

    name: str
    shape: Shape
    dtype: str = "float32"
    trained: bool = True

    def __post_init__(self) -> None:
        if self.dtype not in BITS:
            remedy = f"Known are {', '.join(BITS)}."
            raise ValueError(message(f"the dtype of {cut(self.name)}", "a known dtype", cut(self.dtype), remedy))
        check_size(self.name, self.shape, BITS[self.dtype])

    @cached_property
    def size(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)

    @property
    def itemsize(self) -> int:
        """Bytes of one element, 1 for those that share a byte."""
        return max(1, BITS[self.dtype] // 8)

    @cached_property
    def nbytes(self) -> int:
        return check_size(self.name, self.shape, BITS[self.dtype])

    def local(self, shards: int) -> Parameter:
        """The part of the first of ``shards`` ranks, the largest: FSDP2 cuts dimension 0 as ``torch.chunk`` does."""
        return replace(self, shape=local_shape(self.shape, shards))


def local_shape(shape: Shape, shards: int) -> Shape:
    return (-(-shape[0] // shards), *shape[1:]) if shape else shape


def parameters(
    tensors: Mapping[str, Any] | Iterable[Any], dtype: str | None = None, frozen: Iterable[str] = ()
) -> list[Parameter]:
    """Bring whatever names shapes into one form.

    Args:
        tensors: a mapping from name to shape or tensor, or an iterable of shapes, tensors or :class:`Parameter`.
            Of a tensor (anything with ``shape``) the dtype is read as well, and ``requires_grad`` or
            ``trainable``; shapes alone are float32.
        dtype: what trained tensors are stored in instead.
        frozen: patterns with ``*`` and ``?``; a tensor whose name fits one is not trained.

    Raises:
        TypeError, ValueError: with the argument, the rule, the value and the remedy.
    """
    if dtype is not None and dtype not in TRAINED:
        raise ValueError(
            message("dtype", f"one of {', '.join(TRAINED)}", dtype, "Leave it out to keep what is stored.")
        )
    patterns = tuple(frozen)
    pairs = tensors.items() if isinstance(tensors, Mapping) else ((None, tensor) for tensor in tensors)
    described: list[Parameter] = []
    for position, (name, value) in enumerate(pairs):
        parameter = _parameter(f"tensor {position}" if name is None else name, value)
        if any(fnmatchcase(parameter.name, pattern) for pattern in patterns):
            parameter = replace(parameter, trained=False)
        if parameter.dtype not in TRAINED:
            parameter = replace(parameter, trained=False)
        elif dtype is not None:
            parameter = replace(parameter, dtype=dtype)
        described.append(parameter)
        if len(described) > MAX_TENSORS:
            raise ValueError(
                message("the number of tensors", f"<= {MAX_TENSORS:,}", "more", "Plan one part at a time.")
            )
    check_total(described)
    return described


def check_total(described: Iterable[Parameter]) -> None:
    """Refuse a model that no figure here could hold."""
    total = sum(parameter.nbytes for parameter in described)
    if total > MAX_BYTES:
        raise ValueError(message("the model", "of fewer than 2**63 bytes", f"{total:.3g}", "Check the shapes."))


def _parameter(name: str, value: Any) -> Parameter:
    if isinstance(value, Parameter):
        return value
    if not hasattr(value, "shape"):
        if isinstance(value, str | bytes | os.PathLike) or not isinstance(value, Iterable):
            raise TypeError(message(cut(name), "a shape or a tensor", value, "Pass tuples such as (4096, 4096)."))
        return Parameter(name, tuple(value))
    dtype = str(getattr(value.dtype, "name", value.dtype)).rpartition(".")[2]  # torch says "torch.float32"
    trained = getattr(value, "requires_grad", None)
    trained = getattr(value, "trainable", True) if trained is None else trained
    return Parameter(
        getattr(value, "path", name) if name.startswith("tensor ") else name,
        tuple(int(n) for n in value.shape),
        "float8" if dtype.startswith("float8") else dtype,
        bool(trained),
    )
