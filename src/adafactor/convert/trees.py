"""Trees of JAX as nested dictionaries, and trees with some leaves replaced."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from adafactor.convert.state import Array
from adafactor.core.errors import Refused, message

Tree = Any
Flat = dict[str, Any]  # leaves by path


def plain(tree: Tree) -> Any:
    """A pytree as ``flax.serialization.to_state_dict`` has it: dictionaries, lists by their indices as text."""
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return {name: plain(getattr(tree, name)) for name in tree._fields}
    if isinstance(tree, list | tuple):
        return {str(index): plain(value) for index, value in enumerate(tree)}
    if isinstance(tree, Mapping):
        return {str(name): plain(value) for name, value in tree.items()}
    if tree is None or isinstance(tree, bool | int | float | str | np.ndarray | np.generic):
        return tree
    if hasattr(tree, "__array__"):
        return array(tree)
    import jax

    leaves = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda leaf: leaf is None)[0]
    if len(leaves) == 1 and not leaves[0][0]:
        return tree  # a leaf of a kind that nobody here knows
    nested: dict[str, Any] = {}
    for path, leaf in leaves:
        put(nested, jax.tree_util.keystr(path, simple=True, separator="/"), plain(leaf))
    return nested


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
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return type(tree)(*(grafted(getattr(tree, name), leaves, joined(path, name)) for name in tree._fields))
    if isinstance(tree, list | tuple):
        return type(tree)(grafted(value, leaves, joined(path, str(index))) for index, value in enumerate(tree))
    if isinstance(tree, Mapping):
        members = {name: grafted(value, leaves, joined(path, str(name))) for name, value in tree.items()}
        kind: Any = type(tree)
        return members if kind is dict else kind(members)
    if tree is None or hasattr(tree, "__array__") or isinstance(tree, bool | int | float | str):
        return tree
    import jax

    structure: Any
    named, structure = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda leaf: leaf is None)
    paths = [joined(path, jax.tree_util.keystr(each, simple=True, separator="/")) for each, _ in named]
    pairs = zip(paths, named, strict=True)
    return structure.unflatten([_like(leaf, leaves[at]) if at in leaves else leaf for at, (_, leaf) in pairs])


def _like(old: Any, value: Array) -> Any:
    """An array of the dtype of the old one, and of its kind: JAX's, where it was, or NumPy's."""
    value = np.asarray(value, np.asarray(old).dtype if not hasattr(old, "dtype") else old.dtype)
    if hasattr(old, "sharding"):
        import jax

        return jax.device_put(value, old.sharding)
    return value
