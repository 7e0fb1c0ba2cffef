"""Files of this optimizer and of ``keras.optimizers.Adafactor``: which of their entries belongs to which variable.

Keras keys a saved optimizer by position, so the order of ``optimizer.saved_variables`` is a contract.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np

from adafactor.core import factoring
from adafactor.core.dialects import KERAS, keras_order, last_two
from adafactor.core.errors import message
from adafactor.core.factoring import Layout
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
    pairs = [
        (layout, keras_order(KERAS, last_two(tuple(variable.shape))))
        for variable, layout in zip(variables, layouts, strict=True)
    ]
    own = sum(len(layout.slots) + momentum for layout in layouts if layout is not None)
    start = count - own
    if saved == start + sum(len(list(filter(None, words))) for layout, words in pairs if layout is not None):
        pairs = [(layout, list(filter(None, words))) for layout, words in pairs]
    position = start
    positions: list[int | None] = list(range(start))
    for variable, (layout, words) in zip(variables, pairs, strict=True):
        if layout is None:
            position += words.count("")
            continue
        if layout.factored and layout != factoring.layout(layout.shape, "last_two"):
            remedy = 'Pass factoring="last_two" to load this file.'
            rule = "the last two axes, as in a file of keras.optimizers.Adafactor"
            axes = (layout.rows, layout.columns)
            raise ValueError(message(f"the factored axes of {path_of(variable)}", rule, axes, remedy))
        # The velocity of a matrix that we do not factor is its second moment, as far as Keras has one.
        wanted = list(layout.slots) if layout.factored else words[-1:]
        positions += [position + words.index(word) for word in wanted]
        positions += [None] if momentum else []
        position += len(words)
    return positions, position
