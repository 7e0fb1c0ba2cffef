"""One state for every framework: what Adafactor remembers of a model, as plain data, and the file that holds it.

``docs/state.md`` describes the file. Nothing here knows a framework; ``adafactor.convert`` reads and writes theirs.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from adafactor.core import factoring
from adafactor.core.errors import Refused, message
from adafactor.core.factoring import Factored, Layout, Shape
from adafactor.core.files import PathLike, replacing
from adafactor.core.safetensors import DTYPES, header
from adafactor.core.untrusted import reading

Array = NDArray[Any]
Group = Mapping[str, Any]

#: Of the file's metadata. A change of names or meanings is a new number, with a way to read the old one.
SCHEMA = 1
#: Bytes of a header that are read at most: a hundred thousand parameters, and JSON grows thirtyfold when it is parsed.
LARGEST_HEADER = 64_000_000
METADATA, DIGEST = "adafactor", "sha256"
STATISTICS = ("row", "column", "second_moment")
#: What the file says of a parameter beside its shape and its slots.
_ROLES, _TOLD = ("rows", "columns", "batch"), ("name", "count", "dtype", "group", "rms")


@dataclass(frozen=True, eq=False)
class Parameter:
    """What is remembered of one parameter.

    Attributes:
        name: as its framework calls it.
        layout: its shape, and the role of every axis.
        slots: arrays by name. ``row`` and ``column``, or ``second_moment``: float32 or float64, means (not sums) over
            the axes they lack, of the shapes ``layout.slots`` gives. ``momentum``, of the parameter's shape unless it
            is of integers, where there is one. Any other name is an extra slot: its array is carried along as it is.
        count: updates made, at least 0. The next one is number count + 1.
        dtype: of the parameter itself, ``None`` where the source does not tell.
        group: index into ``State.groups``.
        rms: root mean square of the parameter at its last update, ``None`` where the source does not tell.
    """

    name: str
    layout: Layout
    slots: Mapping[str, Array]
    count: int
    dtype: str | None = None
    group: int = 0
    rms: float | None = None

    @property
    def shape(self) -> Shape:
        return self.layout.shape

    @property
    def momentum(self) -> Array | None:
        return self.slots.get("momentum")

    @property
    def statistics(self) -> dict[str, Array]:
        """``row`` and ``column``, or ``second_moment``."""
        return {name: self.slots[name] for name in self.layout.slots}

    @property
    def extra(self) -> dict[str, Array]:
        """The slots that only some writers know."""
        return {name: value for name, value in self.slots.items() if name not in (*STATISTICS, "momentum")}


@dataclass(frozen=True, eq=False)
class State:
    """The state of a whole model.

    Attributes:
        parameters: in the order of the source.
        groups: hyperparameters in the project's own names (``Hyperparameters``, and ``learning_rate``,
            ``weight_decay``, ``factoring``, ...), one mapping per group of parameters. A name that is missing is
            unknown. ``momentum_of`` says what momentum averages: ``"update"`` (before the learning rate, eq. 12) or
            ``"step"`` (after it, as optax does).
        framework, optimizer, version: who wrote it.
    """

    parameters: tuple[Parameter, ...]
    groups: tuple[Group, ...] = field(default_factory=lambda: ({},))
    framework: str = ""
    optimizer: str = ""
    version: str = ""

    def __post_init__(self) -> None:
        names = [parameter.name for parameter in self.parameters]
        if len(set(names)) != len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise Refused(message("a parameter's name", "used once", twice, "Rename one with a names file."))
        for parameter in self.parameters:
            _check(parameter, len(self.groups))

    @property
    def hyperparameters(self) -> Group:
        """Those of the first group."""
        return self.groups[0]

    @property
    def count(self) -> int:
        """Updates made: the largest count of any parameter, 0 without parameters."""
        return max((parameter.count for parameter in self.parameters), default=0)

    def named(self) -> dict[str, Parameter]:
        return {parameter.name: parameter for parameter in self.parameters}

    def with_hyperparameters(self, values: Mapping[str, Any]) -> State:
        """The same state, with hyperparameters that the source did not tell, or other ones, in every group."""
        return replace(self, groups=tuple({**group, **values} for group in self.groups))


def _check(parameter: Parameter, groups: int) -> None:
    name, slots = parameter.name, parameter.slots
    missing = [slot for slot in parameter.layout.slots if slot not in slots]
    if missing or any(slot in slots for slot in STATISTICS if slot not in parameter.layout.slots):
        rule, held = " and ".join(parameter.layout.slots), sorted(set(slots) & set(STATISTICS))
        raise Refused(message(f"the statistics of {name}", rule, held, "Read it with the axes it was factored over."))
    wanted: dict[str, Shape] = dict(parameter.layout.slots)
    if parameter.momentum is not None and parameter.momentum.dtype.kind not in "iu":  # integers may lie in blocks
        wanted["momentum"] = parameter.shape
    for slot, shape in wanted.items():
        if slot in slots and slots[slot].shape != shape:
            remedy = f"The parameter's shape is {parameter.shape}."
            raise Refused(message(f"{slot} of {name}", f"of shape {shape}", slots[slot].shape, remedy))
    for slot in parameter.layout.slots:
        value = slots[slot]
        if value.dtype not in (np.float32, np.float64):
            rule, remedy = "float32 or float64", "Convert the array."
            raise Refused(message(f"the dtype of {slot} of {name}", rule, str(value.dtype), remedy))
        if value.size and not (np.isfinite(value).all() and value.min() >= 0):
            worst = float(value[~np.isfinite(value)].flat[0] if not np.isfinite(value).all() else value.min())
            remedy = "The run has gone wrong before it was saved; take an earlier file."
            raise Refused(message(f"{slot} of {name}", "finite and >= 0", worst, remedy))
    if isinstance(parameter.count, bool) or not isinstance(parameter.count, int) or not 0 <= parameter.count < 1 << 63:
        remedy = "It counts the updates made."
        raise Refused(message(f"the count of {name}", "an integer >= 0 and < 2**63", parameter.count, remedy))
    if parameter.rms is not None and not isinstance(parameter.rms, int | float):
        raise Refused(message(f"the rms of {name}", "a number or None", parameter.rms, "Save the file again."))
    if not 0 <= parameter.group < groups:
        rule = f"an index into {groups} groups"
        raise Refused(message(f"the group of {name}", rule, parameter.group, "Save the file again."))


def write(state: State, path: PathLike) -> None:
    """Write a state to a safetensors file, which is there whole or not at all.

    Raises:
        FileNotFoundError: the folder does not exist.
        TypeError, ValueError: a hyperparameter or an extra slot is not plain data.
    """
    from safetensors.numpy import save_file

    tensors = {
        f"{slot}:{parameter.name}": np.asarray(value, order="C")
        for parameter in state.parameters
        for slot, value in parameter.slots.items()
    }
    for key, value in tensors.items():
        if value.dtype.kind == "c" or value.dtype.name not in DTYPES.values():
            raise Refused(message(f"the dtype of {key}", "one of safetensors'", str(value.dtype), "Convert the array."))
    told = _describe(state)
    told[DIGEST] = _digest(told, tensors)
    with replacing(path) as new:
        save_file(tensors, new, {METADATA: json.dumps(told, sort_keys=True)})


def read(path: PathLike) -> State:
    """The state in a file that ``write`` wrote.

    Nothing is allocated that the file does not hold: the header is checked against the file's length first, and every
    byte against the checksum.

    Raises:
        FileNotFoundError: there is no such file.
        Refused: the file is damaged, from a later release, or something else.
    """
    with reading(path, "a state file of adafactor"):
        held, text = header(Path(path), LARGEST_HEADER, METADATA)
        if text is None:
            raise ValueError(f"it has no {METADATA} in its metadata")
        told = json.loads(text)
        if told["schema"] != SCHEMA:
            remedy = "Read it with the release of adafactor that wrote it."
            raise Refused(message(f"the schema of {path}", str(SCHEMA), told["schema"], remedy))
        from safetensors.numpy import load_file

        if any(tensor.dtype == "bfloat16" for tensor in held):
            import ml_dtypes  # noqa: F401 - NumPy learns the dtype from it
        tensors = load_file(path)
        if told.pop(DIGEST) != _digest(told, tensors):
            raise Refused(message(f"the checksum of {path}", "that of its content", "another", "Copy the file again."))
        return _restore(told, tensors)


def is_state(path: PathLike) -> bool:
    """Whether a file looks like a safetensors file with our metadata."""
    try:
        return header(Path(path), LARGEST_HEADER, METADATA)[1] is not None
    except Refused:
        return False


def _describe(state: State) -> dict[str, Any]:
    return {
        "schema": SCHEMA,
        "writer": {"framework": state.framework, "optimizer": state.optimizer, "version": state.version},
        "groups": [dict(group) for group in state.groups],
        "parameters": [
            {
                **{word: getattr(parameter.layout, word) for word in ("shape", *_ROLES)},
                **{word: getattr(parameter, word) for word in _TOLD},
                "slots": list(parameter.slots),
            }
            for parameter in state.parameters
        ],
    }


def _restore(told: dict[str, Any], tensors: dict[str, Array]) -> State:
    parameters = []
    for each in told["parameters"]:
        name, factored = str(each["name"]), Factored(*(tuple(each[role]) for role in _ROLES))
        layout = factoring.layout(each["shape"], lambda *_, factored=factored: factored, name=name)
        slots = {slot: tensors.pop(f"{slot}:{name}") for slot in each["slots"]}
        parameters.append(Parameter(layout=layout, slots=slots, **{word: each[word] for word in _TOLD}))
    if tensors:
        raise ValueError(f"{next(iter(tensors))} belongs to no parameter")
    return State(tuple(parameters), tuple(dict(group) for group in told["groups"]), **told["writer"])


def _digest(told: Mapping[str, Any], tensors: Mapping[str, Array]) -> str:
    """Of the description and of every tensor's name, dtype, shape and bytes."""
    digest = hashlib.sha256(json.dumps(told, allow_nan=False, sort_keys=True).encode())
    for key in sorted(tensors):
        value = tensors[key]
        digest.update(f"\0{key}\0{value.dtype.name}\0{value.shape}\0".encode())
        digest.update(np.asarray(value, order="C").reshape(-1).view(np.uint8).data)
    return digest.hexdigest()
