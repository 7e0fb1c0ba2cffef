"""Trees of JAX as nested dictionaries, and trees with some leaves replaced."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from adafactor.convert.state import Array
from adafactor.core.errors import Refused, message

Tree = Any
Flat = dict[str, Any]  # leaves by path


def _node(tree: Tree) -> tuple[list[tuple[str, Any]], Callable[[list[Any]], Tree]] | None:
    """The members of a node by name, and what makes a node like it of others; ``None`` for a leaf."""
    if isinstance(tree, Mapping):  # JAX would sort it
        kind: Any = type(tree)
        return [(str(name), value) for name, value in tree.items()], lambda new: kind(dict(zip(tree, new, strict=True)))
    if tree is None or isinstance(tree, bool | int | float | str) or hasattr(tree, "__array__"):
        return None
    import jax

    structure: Any
    named, structure = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda each: each is not tree)
    if len(named) == 1 and not named[0][0]:
        return None  # a leaf of a kind that nobody here knows
    return [(jax.tree_util.keystr(path, simple=True), value) for path, value in named], structure.unflatten


def plain(tree: Tree) -> Any:
    """A pytree as ``flax.serialization.to_state_dict`` has it: dictionaries, lists by their indices as text."""
    node = _node(tree)
    if node is not None:
        return {name: plain(value) for name, value in node[0]}
    known = isinstance(tree, np.ndarray | np.generic) or not hasattr(tree, "__array__")
    return tree if known else array(tree)


def put(nested: dict[str, Any], path: str, value: Any) -> None:
    *folders, last = path.split("/")
    for folder in folders:
        nested = nested.setdefault(folder, {})
    nested[last] = value


def flat(tree: Any, prefix: str = "", stop: Callable[[Any], bool] = lambda value: False) -> Flat:
    """Leaves by path; ``None`` counts as one."""
    if not isinstance(tree, Mapping) or stop(tree):
        return {prefix: tree}
    leaves: Flat = {}
    for name, value in tree.items():
        leaves |= flat(value, joined(prefix, str(name)), stop)
    return leaves


def array(value: Any) -> Array:
    if not getattr(value, "is_fully_addressable", True):
        remedy = "Gather it with jax.experimental.multihost_utils.process_allgather(state, tiled=True)."
        raise Refused(message("an array", "on this process as a whole", str(value.sharding), remedy))
    return np.asarray(value)


def joined(*names: str) -> str:
    """A path, without the names that are empty."""
    return "/".join(filter(None, names))


def grafted(tree: Tree, leaves: Flat, path: str = "") -> Tree:
    """The tree with new leaves by the paths that ``plain`` and ``flat`` give; its structure and dtypes stay."""
    if path in leaves:
        return _like(tree, leaves[path])
    node = _node(tree)
    if node is None:
        return tree
    members, made = node
    return made([grafted(value, leaves, joined(path, name)) for name, value in members])


def _like(old: Any, value: Array) -> Any:
    """An array of the dtype of the old one, and of its kind: JAX's, where it was, or NumPy's."""
    value = np.asarray(value, np.asarray(old).dtype if not hasattr(old, "dtype") else old.dtype)
    if hasattr(old, "sharding"):
        import jax

        return jax.device_put(value, old.sharding)
    return value
