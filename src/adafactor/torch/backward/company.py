"""When a gradient is final: at once, or with those of its FSDP2 module."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor
from torch.nn import Module

from adafactor.engine.torch.work import is_sharded
from adafactor.torch.members import Place


class Company(Protocol):
    """Whose gradients become final together. Every method gives lists of places to be stepped, each at a time."""

    def begin(self) -> None:
        """A pass begins; what an error has left of the one before is forgotten."""

    def arrive(self, place: Place, param: Tensor) -> Iterable[list[Place]]:
        """A pass has completed a gradient."""
        ...

    def flush(self) -> Iterable[list[Place]]:
        """A graph task of the pass has ended."""
        ...

    def finish(self, held: bool) -> Iterable[list[Place]]:
        """The pass has ended; ``held``: and some gradients may be of earlier passes alone."""
        ...


@dataclass(eq=False)
class _Bucket:
    """Parameters whose gradients come together, those of one FSDP2 module: stepped together, in one all-reduce."""

    members: list[Tensor] = field(default_factory=list)
    ready: list[Place] = field(default_factory=list)

    @property
    def full(self) -> bool:
        return len(self.ready) >= sum(param.requires_grad for param in self.members)


class Modules:
    """Every gradient is final when it comes, and those of an FSDP2 module are stepped together."""

    def __init__(self, model: Module, places: Mapping[Tensor, Place]) -> None:
        self._places = places
        self._buckets = _buckets(model)
        self._waiting: _Bucket | None = None
        for param, bucket in self._buckets.items():
            if param in places:
                bucket.members.append(param)

    def begin(self) -> None:
        if self._waiting is not None:
            self._waiting.ready.clear()
            self._waiting = None

    def arrive(self, place: Place, param: Tensor) -> Iterable[list[Place]]:
        bucket = self._buckets.get(param)
        if bucket is None:
            return [[place]]
        done = [] if self._waiting is bucket else self.flush()
        self._waiting = bucket
        bucket.ready.append(place)
        return [*done, *self.flush()] if bucket.full else done

    def flush(self) -> list[list[Place]]:
        bucket, self._waiting = self._waiting, None
        if bucket is None:
            return []
        ready, bucket.ready = bucket.ready, []
        return [ready]

    def finish(self, held: bool) -> Iterable[list[Place]]:
        rest = [place for param, place in self._places.items() if param.grad is not None] if held else []
        return [rest] if rest else []


def _buckets(model: Module) -> dict[Tensor, _Bucket]:
    """The FSDP2 module of every sharded parameter."""
    fsdp = getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", None)
    bucket_of: dict[Tensor, _Bucket] = {}

    def visit(module: Module, bucket: _Bucket | None) -> None:
        if fsdp is not None and isinstance(module, fsdp):
            bucket = _Bucket()
        for param in module.parameters(recurse=False):
            if bucket is not None and is_sharded(param):
                bucket_of.setdefault(param, bucket)
        for child in module.children():
            visit(child, bucket)

    visit(model, None)
    return bucket_of
