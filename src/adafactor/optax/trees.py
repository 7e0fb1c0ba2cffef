"""Parameters, and what is said about them leaf by leaf, whatever containers either comes in.

A box is what Flax puts around an array to name its axes: linen's ``Partitioned``, nnx's ``Variable``. Optimizers see
parameters in boxes at one time and without them at another (``nnx.Optimizer``), so a box's own key is no part of a
leaf's path, and a statistic in a box has the names of the axes that it has. Nothing here imports Flax.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from adafactor.core.errors import message
from adafactor.core.factoring import Shape

Tree = Any  # a pytree, of what its context says
Path = tuple[str, ...]

#: Under which nnx keeps the names of a variable's axes, and those that its optimizer's variables shall have.
_NAMES = ("out_sharding", "optimizer_sharding", "sharding_names", "sharding")


def flatten(tree: Tree) -> tuple[list[Any], Any]:
    """Leaves and structure. ``None`` is a leaf: what does not exist has its place in every tree."""
    return jax.tree.flatten(tree, is_leaf=_is_none)


def paths(tree: Tree) -> list[Path]:
    """The path of every leaf of `flatten`."""
    return [path for path, _ in _leaves(tree, _is_none)]


def broadcast(argument: str, prefix: Tree, tree: Tree, is_leaf: Callable[[Any], bool] | None = None) -> list[Any]:
    """What ``prefix``, a tree like the other one or like the upper part of it, says of every leaf of `flatten`.

    Raises:
        ValueError: it says nothing of a leaf.
    """
    leaves, _ = flatten(tree)
    if jax.tree_util.treedef_is_leaf(jax.tree.structure(prefix, is_leaf=is_leaf)):
        return [prefix] * len(leaves)
    said = dict(_leaves(prefix, is_leaf))
    values = []
    for path, leaf in zip(paths(tree), leaves, strict=True):
        above = next((path[:n] for n in range(len(path), -1, -1) if path[:n] in said), None)
        if above is None and leaf is not None:
            given = ["/".join(place) for place in said][:5]
            rule = f"a tree like the parameters, with an entry for {'/'.join(path)}"
            raise ValueError(message(argument, rule, given, "A value may stand for a whole branch."))
        values.append(None if above is None else said[above])
    return values


def is_function(value: Any, is_entry: Callable[[Any], bool] = lambda leaf: not callable(leaf)) -> bool:
    """Whether it is to be called, and no tree of entries with a ``__call__``, as Equinox's modules have one."""
    leaves = jax.tree.leaves(value, is_leaf=is_entry)
    return callable(value) and not (leaves and all(map(is_entry, leaves)))


def unflatten(treedef: Any, leaves: Sequence[Any], removed: Sequence[Shape]) -> Tree:
    """The tree of these leaves; the names in their boxes are the structure's less each leaf's removed axes."""
    axes = iter(removed)

    def named(node: Any) -> Any:
        own = [next(axes) for _ in (flatten(node)[0] if _is_box(node) else [node])]
        return _renamed(node, own[0]) if _is_box(node) and own else node

    return jax.tree.map(named, treedef.unflatten(leaves), is_leaf=lambda node: node is None or _is_box(node))


def _leaves(tree: Tree, is_leaf: Callable[[Any], bool] | None, above: Path = ()) -> Iterator[tuple[Path, Any]]:
    stops = is_leaf or (lambda node: False)
    nodes, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda node: _is_box(node) or stops(node))
    for keys, node in nodes:
        path = above + tuple(jax.tree_util.keystr((key,), simple=True) for key in keys)
        if not _is_box(node):
            yield path, node
            continue
        for _, child in jax.tree_util.tree_flatten_with_path(node, is_leaf=lambda inner, box=node: inner is not box)[0]:
            yield from _leaves(child, is_leaf, path)


def _is_none(node: Any) -> bool:
    return node is None


def _is_box(node: Any) -> bool:
    return hasattr(type(node), "replace_boxed") or hasattr(type(node), "set_metadata")


def _renamed(box: Any, removed: Shape) -> Any:
    """The box with names of the axes that are left. Those of what does not exist are none."""
    exists = any(leaf is not None for leaf in flatten(box)[0])
    if hasattr(type(box), "replace_boxed"):
        names = getattr(box, "names", None)
        return box if names is None else box.replace(names=_less(names, removed) if exists else ())
    metadata = box.get_metadata()
    changes = {key: _less(metadata[key], removed) if exists else () for key in _NAMES if metadata.get(key)}
    if changes:
        box.set_metadata(**changes)
    return box


def _less(names: Any, removed: Shape) -> Any:
    """Names of axes, or a sharding by names, less the removed axes."""
    if isinstance(names, NamedSharding):
        return NamedSharding(names.mesh, _less(names.spec, removed))
    if isinstance(names, PartitionSpec):
        return PartitionSpec(*_less(tuple(names), removed))
    if isinstance(names, tuple | list):
        return type(names)(name for axis, name in enumerate(names) if axis not in removed)
    return _less(names.sharding, removed) if hasattr(names, "sharding") else names  # a Format: its layout goes
