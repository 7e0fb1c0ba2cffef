"""Files of this optimizer and of ``keras.optimizers.Adafactor``: which of their entries belongs to which variable.

Keras keys a saved optimizer by position, so the order of ``optimizer.saved_variables`` is a contract.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np

from adafactor.core.errors import message
from adafactor.core.factoring import Layout, layout
from adafactor.keras.variables import path_of

#: Written beside the variables of every saved optimizer. Its absence marks a file of ``keras.optimizers.Adafactor``.
STATE_VERSION = 1
VERSION_KEY = "state_version"


def load(
    optimizer: Any, store: Any, variables: Sequence[Any], layouts: Sequence[Layout | None], momentum: bool
) -> None:
    """Set every variable of ``optimizer`` from a store of ours or of Keras's class.

    Args:
        store: what Keras hands to ``load_own_variables``.
        variables, layouts: the trainable variables the optimizer was built on, and their layouts.
        momentum: whether each of them has one.

    Raises:
        ValueError: the file does not fit this optimizer. Nothing has changed then.
    """
    keys = set(store.keys()) - {VERSION_KEY}
    if VERSION_KEY in store.keys():  # noqa: SIM118 - Keras's stores have keys() and no `in`
        version = int(np.asarray(store[VERSION_KEY]))
        if version != STATE_VERSION:
            remedy = "Load it with the release of adafactor that wrote it."
            raise ValueError(message(f"the state version of {optimizer.name!r}", str(STATE_VERSION), version, remedy))
        positions: list[int | None] = list(range(len(optimizer.saved_variables)))
        expected = len(positions)
    else:
        positions, expected = _keras_positions(len(optimizer.saved_variables), len(keys), variables, layouts, momentum)
    if len(keys) != expected:
        warnings.warn(
            f"Skipping variable loading for optimizer '{optimizer.name}', because it has "
            f"{len(optimizer.saved_variables)} variables and expects {expected} in the file, which has {len(keys)}. "
            "Build it on the same variables, with the same options, before loading.",
            stacklevel=2,
        )
        return
    pairs = [
        (variable, np.zeros(variable.shape) if position is None else np.asarray(store[str(position)]))
        for variable, position in zip(optimizer.saved_variables, positions, strict=True)
    ]
    for variable, value in pairs:
        if value.shape != tuple(variable.shape):
            rule = f"of shape {tuple(variable.shape)}"
            remedy = "Build the optimizer on the same model, with the factoring the file was written with."
            raise ValueError(message(f"the saved {variable.path}", rule, value.shape, remedy))
    for variable, value in pairs:
        variable.assign(value)


def _keras_positions(
    count: int, saved: int, variables: Sequence[Any], layouts: Sequence[Layout | None], momentum: bool
) -> tuple[list[int | None], int]:
    """Where ``keras.optimizers.Adafactor`` keeps each of our ``count`` variables (no momentum), and how many it keeps.

    It stores row, column and velocity of every variable. Below rank 2 the first two are placeholders, which are
    missing from a file written inside a ``LossScaleOptimizer``; the number of variables ``saved`` in the file tells.
    """
    roles = [(len(variable.shape) >= 2, its_layout) for variable, its_layout in zip(variables, layouts, strict=True)]
    own = sum(len(its_layout.slots) + momentum for _, its_layout in roles if its_layout is not None)
    start = count - own
    kept = sum(3 if matrix else 1 for matrix, its_layout in roles if its_layout is not None)
    placeholders = 0 if saved == start + kept else 2
    position = start
    positions: list[int | None] = list(range(start))
    for variable, (matrix, its_layout) in zip(variables, roles, strict=True):
        if not matrix:
            position += placeholders
        if its_layout is None:
            continue
        if its_layout.factored and its_layout != layout(its_layout.shape, "last_two"):
            remedy = 'Pass factoring="last_two" to load this file.'
            rule = "the last two axes, as in a file of keras.optimizers.Adafactor"
            axes = (its_layout.rows, its_layout.columns)
            raise ValueError(message(f"the factored axes of {path_of(variable)}", rule, axes, remedy))
        if its_layout.factored:
            positions += [position, position + 1]
        else:
            positions += [position + 2 if matrix else position]
        positions += [None] if momentum else []
        position += 3 if matrix else 1
    return positions, position
