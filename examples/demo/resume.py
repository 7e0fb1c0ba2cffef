"""Does a saved run go on as if nothing had happened? Compared bit for bit."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import keras

from adafactor.cli.demo.train import Batches


@dataclass(frozen=True, slots=True)
class Resume:
    """The outcome: how far both copies went, how many variables were compared, and which of them differ."""

    steps: int
    variables: int
    differing: list[str]

    @property
    def bit_equal(self) -> bool:
        return not self.differing


def resume(model: Any, file: Path, batches: Batches) -> Resume:
    """Load ``file``, train it and ``model``, which it was saved from, on the same batches, and compare.

    Compared are the weights and the whole state of the optimizer: iteration and statistics.
    """
    loaded = keras.saving.load_model(file)
    for each in (model, loaded):
        each.fit(batches, epochs=1, verbose=0, shuffle=False)
    pairs = list(zip(_variables(model), _variables(loaded), strict=True))
    differing = [
        variable.path
        for variable, other in pairs
        if keras.ops.convert_to_numpy(variable).tobytes() != keras.ops.convert_to_numpy(other).tobytes()
    ]
    return Resume(len(batches), len(pairs), differing)


def _variables(model: Any) -> list[Any]:
    return [*model.variables, *model.optimizer.variables]
