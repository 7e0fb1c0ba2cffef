"""What a parameter calls when a backward pass has added to its gradient."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from adafactor.torch.members import Place


class _Hook:
    """It must not hold what holds the parameter: Python's collector does not see through a parameter to its hooks."""

    def __init__(self, ready: Callable[[Place, Tensor], None], place: Place) -> None:
        self._ready, self._place = weakref.WeakMethod(ready), place

    @property
    def owner(self) -> Any:
        ready = self._ready()
        return None if ready is None else ready.__self__  # type: ignore[attr-defined]

    def __call__(self, param: Tensor) -> None:
        ready = self._ready()
        if ready is not None:
            ready(self._place, param)


class _UntracedHook(_Hook):
    """The same where the compiler is loaded: compiled autograd would trace into the step."""

    def __init__(self, ready: Callable[[Place, Tensor], None], place: Place) -> None:
        super().__init__(ready, place)
        self._call = torch.compiler.disable(super().__call__)  # type: ignore[no-untyped-call]

    def __call__(self, param: Tensor) -> None:
        self._call(param)


def register(param: Tensor, ready: Callable[[Place, Tensor], None], place: Place) -> None:
    """Let a parameter call a method. Also where it is frozen, since it may be unfrozen."""
    hook = (_UntracedHook if "torch._dynamo" in sys.modules else _Hook)(ready, place)  # which takes a second to import
    frozen = not param.requires_grad
    if frozen:
        param.requires_grad_(True)
    try:
        param.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]
    finally:
        if frozen:
            param.requires_grad_(False)


def unregister(params: Iterable[Tensor], owner: object) -> None:
    """Remove an object's hooks, and those of objects that are gone."""
    for param in params:
        hooks: Any = param._post_accumulate_grad_hooks or {}
        for key in [key for key, hook in hooks.items() if isinstance(hook, _Hook) and hook.owner in (owner, None)]:
            del hooks[key]


def is_hooked(param: Tensor) -> bool:
    return any(isinstance(hook, _Hook) for hook in (param._post_accumulate_grad_hooks or {}).values())
