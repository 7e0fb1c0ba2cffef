"""Keras's ``.keras`` and ``.weights.h5``: an HDF5 file of variables, read by h5py in the child of ``sandbox``.

A ``.keras`` file also says which layers are trainable, and its batch normalizations which variables are not.
"""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

from adafactor.core.untrusted import cut, member, parse, stored
from adafactor.planning.files.keras_layers import Layer, layers
from adafactor.planning.parameters import Parameter

MAX_CONFIG = 32_000_000


def open_archive(path: Path) -> list[Parameter]:
    """The variables of a ``.keras`` file. HDF5 is read where it lies in the archive, which Keras does not compress."""
    name = cut(path.name)
    with path.open("rb") as file, zipfile.ZipFile(file) as archive:
        config = archive.read(member(archive, "config.json", name, MAX_CONFIG))
        weights = stored(file, member(archive, "model.weights.h5", name), name)
        return _variables(weights, layers(parse(config, f"config.json in {name}")))


def open_weights(path: Path) -> list[Parameter]:
    """The variables of a ``.weights.h5`` file."""
    with path.open("rb") as file:
        return _variables(file, {})


def _variables(file: Any, known: dict[str, Layer]) -> list[Parameter]:
    import h5py

    groups: dict[str, list[tuple[int, Parameter]]] = {}

    def visit(path: str, item: Any) -> None:
        if not isinstance(item, h5py.Dataset) or path.startswith("optimizer/"):
            return
        dtype = str(item.attrs.get("dtype", "") or item.dtype.name)
        if item.shape is None or item.dtype.kind not in "biufcV":
            return
        group, _, key = path.rpartition("/")
        dtype = "float8" if dtype.startswith("float8") else dtype
        place = int(key) if key.isascii() and key.isdigit() and len(key) < 10 else 0
        shape = tuple(int(n) for n in item.shape)
        groups.setdefault(group, []).append((place, Parameter(path, shape, dtype)))

    parameters: list[Parameter] = []
    with h5py.File(file, "r") as opened:
        opened.visititems(visit)
        for group, members in groups.items():
            layer = _layer_of(group, opened, known)
            members.sort(key=lambda member: member[0])
            for position, (_, p) in enumerate(members):
                parameters.append(Parameter(p.name, p.shape, p.dtype, layer.trains(position, len(members))))
            for matrix, shape in zip("ab", layer.adapters(members[0][1].shape), strict=False):
                parameters.append(Parameter(f"{group}/lora_{matrix}", shape, "float32", layer.trainable))
    return parameters


def _layer_of(group: str, opened: Any, known: dict[str, Layer]) -> Layer:
    """The layer whose variables are in a group ``.../vars``: its own words, or those of the layer around it."""
    path = group
    while path:
        layer = known.get(str(opened[path].attrs.get("name", ""))) if path in opened else None
        if layer is not None:
            return layer if path == group else Layer(trainable=layer.trainable)
        outer = path.removesuffix("/vars").rpartition("/")[0]
        path = f"{outer}/vars" if outer else ""
    return Layer()
