"""What Adafactor remembers between updates, and whether it fits the parameters and the options."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from adafactor.core.errors import message
from adafactor.core.factoring import Layout
from adafactor.optax.trees import Tree, flatten, paths

SLOTS = ("row", "column", "second_moment")


class Diagnostics(NamedTuple):
    """Of the last update, per parameter and per slice of its batch axes. Trees like the parameters'.

    Attributes:
        update_rms: root mean square of the normalised update before clipping (eq. 7). Its spikes precede those of
            the loss.
        clip_factor: what clipping divided the update by, at least 1 (eq. 10).
        parameter_scale: what the learning rate was multiplied by (eq. 9); 1 where that is off.
    """

    update_rms: Tree
    clip_factor: Tree
    parameter_scale: Tree


class AdafactorState(NamedTuple):
    """What Adafactor remembers. The trees have the structure of the parameters, with ``None`` for what does not exist.

    Attributes:
        count: int32[], the number of updates made.
        row, column: second-moment statistics of factored parameters, of the parameter's shape less its column axes
            or its row axes.
        second_moment: that of the other parameters, of the parameter's shape.
        momentum: average of the updates, or ``None`` without momentum.
        diagnostics: of the last update, with ``diagnostics=True``.

    Statistics are float32, float64 for a float64 parameter.
    """

    count: jax.Array  # type: ignore[assignment]  # as optax calls it, over tuple.count
    row: Tree
    column: Tree
    second_moment: Tree
    momentum: Tree
    diagnostics: Diagnostics | None = None


_REMEDY = "Make one with init(params), or turn one of another optimizer or factoring into it with `adafactor convert`."


class Flat(NamedTuple):
    """A state's leaves beside those of the parameters, ``None`` for what does not exist, and the trees they came from.

    ``slots`` by name, ``momentum`` without entries where there is none, ``diagnostics`` one list per field.
    """

    slots: dict[str, list[Any]]
    momentum: list[Any]
    diagnostics: list[list[Any]]
    old: AdafactorState

    def state(self, count: jax.Array) -> AdafactorState:
        """A state of the old one's structure with what the lists hold now."""
        trees = [_like(getattr(self.old, name), leaves) for name, leaves in self.slots.items()]
        momentum = _like(self.old.momentum, self.momentum) if self.momentum else None
        diagnostics = [_like(*pair) for pair in zip(self.old.diagnostics or (), self.diagnostics, strict=True)]
        return AdafactorState._make((count, *trees, momentum, Diagnostics(*diagnostics) if diagnostics else None))


def of(state: Any, params: Tree, momentum: bool, diagnostics: bool) -> Flat:
    """The leaves of a state of these parameters.

    Raises:
        TypeError, ValueError: it is no state, not one of these parameters, or one of an optimizer with other options.
    """
    if not isinstance(state, AdafactorState):
        rule = "an AdafactorState, as init(params) makes it"
        kind = f"{type(state).__module__}.{type(state).__qualname__}"
        order = "The order is update(grads, state, params) and step(params, grads, state)."
        raise TypeError(message("state", rule, kind, f"{_REMEDY} {order}"))
    if jnp.shape(state.count) or not jnp.issubdtype(jnp.result_type(state.count), jnp.integer):
        raise ValueError(message("state.count", "one integer", _brief(state.count), _REMEDY))
    for name, asked, argument in (
        ("momentum", momentum, "momentum=..."),
        ("diagnostics", diagnostics, "diagnostics=True"),
    ):
        if asked != (getattr(state, name) is not None):
            rule = f"there, as {argument} asks for it" if asked else f"None without {argument}"
            raise ValueError(message(f"state.{name}", rule, "None" if asked else "a tree", _REMEDY))
    structure = flatten(params)[1]
    return Flat(
        {name: _beside(f"state.{name}", getattr(state, name), params, structure) for name in SLOTS},
        _beside("state.momentum", state.momentum, params, structure) if momentum else [],
        [_beside("state.diagnostics", tree, params, structure) for tree in state.diagnostics or ()],
        state,
    )


def check(k: int, flat: Flat, layout: Layout, params: Tree) -> None:
    """Refuse what the state holds for parameter ``k`` unless it has the shapes of its layout.

    Raises:
        ValueError: with the parameter's path.
    """
    held = {name: leaves[k] for name, leaves in flat.slots.items() if leaves[k] is not None}
    expected = dict(layout.slots)
    if flat.momentum:
        held, expected = held | {"momentum": flat.momentum[k]}, expected | {"momentum": layout.shape}
    shapes = {name: None if value is None else tuple(jnp.shape(value)) for name, value in held.items()}
    if shapes != expected:
        path = "/".join(paths(params)[k])
        raise ValueError(message(f"the state of parameter {path!r}", f"of the shapes {expected}", shapes, _REMEDY))


def _beside(name: str, tree: Tree, params: Tree, structure: Any) -> list[Any]:
    """The leaves of a tree like the parameters, in their order."""
    leaves, treedef = flatten(tree)
    if treedef != structure and paths(tree) != paths(params):  # in boxes, or out of them, it is the same tree
        remedy = f"Pass the parameters that the state was made for. {_REMEDY}"
        given = ["/".join(path) for path in paths(tree)]
        rule = f"a tree like the parameters, with {len(paths(params))} leaves of their names"
        raise ValueError(message(name, rule, f"{len(given)} leaves: {', '.join(given[:5])}", remedy))
    return leaves


def _like(tree: Tree, leaves: Sequence[Any]) -> Tree:
    return flatten(tree)[1].unflatten(leaves)


def _brief(value: Any) -> str:
    return f"{jnp.result_type(value)}{list(jnp.shape(value))}" if hasattr(value, "shape") else repr(value)
