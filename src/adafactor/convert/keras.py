"""Optimizer state in Keras: live optimizers, ``.keras`` and ``.weights.h5`` files, of Keras's Adafactor and of ours.

Keras keys a saved optimizer by position: ``iteration``; ``learning_rate``, if it is a constant; the moving averages
of ``use_ema``; the accumulators of ``gradient_accumulation_steps``; then per trainable variable

    ours            row and column, or second_moment; momentum with beta_1
    Keras's         r, c, velocity. Row and column are r and c; velocity is their product, or the second moment of a
                    vector, whose r and c are int32 zeros of rank 0

A file has no names. A live optimizer and a ``.keras`` file (read by Keras itself) tell them; for a ``.weights.h5``
file pass the shapes, in order. Keras's own files tell their shapes: its parameters are then called "0", "1", ...
"""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from adafactor.convert import adapt
from adafactor.convert.axes import Axes, Shapes, fitted, rms_of, wide
from adafactor.convert.keras_order import ACCUMULATOR, AVERAGE, STEPS, Order, Saved, order_of
from adafactor.convert.names import Names, rename
from adafactor.convert.report import Report
from adafactor.convert.state import Array, Parameter, State
from adafactor.core.dialects import KERAS, OUR_KERAS, in_our_words
from adafactor.core.errors import Refused, message
from adafactor.core.factoring import Shape
from adafactor.core.files import PathLike, replacing
from adafactor.core.untrusted import check_zip, reading, stored

VERSION_KEY = "state_version"
_VARS, _WEIGHTS, _CONFIG = "optimizer/vars", "model.weights.h5", "config.json"


# -- files -------------------------------------------------------------------------------------------------------------


def load(source: Any, shapes: Shapes | None = None) -> Saved:
    """The optimizer part of a live optimizer, a ``.keras`` or a ``.weights.h5`` file.

    Raises:
        Refused: it is damaged, something else, or has no Adafactor in it.
    """
    if not isinstance(source, str | os.PathLike):
        return _live(source)
    given = None if shapes is None else [(name, tuple(shape)) for name, shape in shapes.items()]
    with reading(source, "a file of Keras with the state of Adafactor"):
        if zipfile.is_zipfile(source):
            names = check_zip(source)
            if _CONFIG not in names or _WEIGHTS not in names:
                raise ValueError(f"it has no {_CONFIG} and {_WEIGHTS}")
            with open(source, "rb") as file, zipfile.ZipFile(file) as archive:
                config = json.loads(archive.read(_CONFIG))
                optimizer = (config.get("compile_config") or {}).get("optimizer") or {}
                if optimizer.get("class_name") != "Adafactor":
                    raise ValueError(f"its optimizer is {optimizer.get('class_name')}")
                saved = _h5(stored(file, archive.getinfo(_WEIGHTS), str(source)))
            saved.config = dict(optimizer.get("config") or {})
            saved.variables = _variables(Path(source)) if given is None else given
        else:
            saved = _h5(source)
            saved.variables = given
    return saved


def _h5(file: Any) -> Saved:
    import h5py

    with h5py.File(file, "r") as opened:
        _check_h5(opened)
        if "optimizer_weights" in opened:
            raise ValueError("it is of Keras's legacy format, which Keras can load and save as .keras")
        if _VARS not in opened:
            raise ValueError(f"it has no {_VARS}: the model was saved without its optimizer, or inside another one")
        group = opened[_VARS]
        keys = [key for key in group if key != VERSION_KEY]
        if sorted(keys, key=int) != [str(number) for number in range(len(keys))]:
            raise ValueError(f"{_VARS} must be numbered from 0")
        values = [np.asarray(group[str(number)]) for number in range(len(keys))]
        version = int(np.asarray(group[VERSION_KEY])) if VERSION_KEY in group else None
    if version not in (None, 1):
        raise ValueError(f"it has version {version} of the state, from a later release of adafactor")
    return Saved(KERAS if version is None else OUR_KERAS, values, {})


def _check_h5(opened: Any) -> None:
    """Refuse what leads out of the file, and what claims to be larger than it is stored."""
    import h5py

    def visit(group: Any, depth: int) -> None:
        if depth > 64:
            raise ValueError("its groups are nested too deeply")
        for name in group:
            if not isinstance(group.get(name, getlink=True), h5py.HardLink):
                raise ValueError(f"{name} is a link")
            member = group[name]
            if isinstance(member, h5py.Group):
                visit(member, depth + 1)
            elif isinstance(member, h5py.Dataset):
                if member.external or member.is_virtual or member.dtype.kind not in "fiubVSO":
                    raise ValueError(f"{name} is not stored in the file")
                if member.dtype.kind != "O" and member.id.get_storage_size() < member.size * member.dtype.itemsize:
                    raise ValueError(f"{name} of shape {member.shape} has no bytes of its own for that")

    visit(opened, 0)


def _variables(path: Path) -> list[tuple[str, Shape]]:
    """Names and shapes of a model's trainable variables, from Keras, without anything that runs code of the file."""
    import keras

    model = keras.saving.load_model(path, compile=False, safe_mode=True)
    return [(variable.path, tuple(variable.shape)) for variable in model.trainable_variables]


def _live(optimizer: Any) -> Saved:
    import keras

    from adafactor.keras.variables import path_of

    if not isinstance(optimizer, keras.optimizers.Optimizer) or type(optimizer).__name__ != "Adafactor":
        raise Refused(message("the source", "an Adafactor of Keras, or a path", type(optimizer).__name__, "Pass one."))
    if not optimizer.built:
        remedy = "Call optimizer.build(model.trainable_variables)."
        raise Refused(message("the optimizer", "built", "one without state", remedy))
    variables = optimizer._trainable_variables
    values = [_numpy(variable) for variable in _saved_variables(optimizer)]
    saved = Saved(OUR_KERAS if hasattr(optimizer, "_layouts") else KERAS, values, optimizer.get_config())
    saved.variables = [(path_of(variable), tuple(variable.shape)) for variable in variables]
    saved.known = [(keras.backend.standardize_dtype(each.dtype), rms_of(_numpy(each))) for each in variables]
    if callable(getattr(optimizer, "factoring", None)):
        saved.config["factoring"] = optimizer.factoring
    return saved


def _saved_variables(optimizer: Any) -> list[Any]:
    """What a file would hold, in order."""
    return list(getattr(optimizer, "saved_variables", optimizer.variables))


def _numpy(variable: Any) -> Array:
    import keras

    if "bfloat16" in str(variable.dtype):
        variable = keras.ops.cast(variable, "float32")
    return np.array(keras.ops.convert_to_numpy(variable))


# -- reading -----------------------------------------------------------------------------------------------------------


def read(
    source: Any,
    *,
    report: Report | None = None,
    shapes: Shapes | None = None,
    axes: Axes | None = None,
    hyperparameters: Mapping[str, Any] | None = None,
) -> State:
    """The state of a live optimizer, or in a ``.keras`` or ``.weights.h5`` file.

    Args:
        source: a built ``keras.optimizers.Adafactor`` or ``adafactor.keras.Adafactor``, or a path.
        shapes: names and shapes of the model's trainable variables in their order, for a file that does not tell.
        axes: ``Factored`` by name, where a function chose them.
        hyperparameters: what a ``.weights.h5`` file does not tell, in the project's names: ``factoring``,
            ``min_dim_size_to_factor``, ``gradient_accumulation_steps``.

    Raises:
        Refused: it is none of them, or does not tell enough.
    """
    report = Report() if report is None else report
    saved = load(source, shapes)
    saved.config = {**saved.config, **(hyperparameters or {})}
    with reading("the optimizer", "an Adafactor of Keras"):
        order = order_of(saved, axes)
        group = _group(saved, order, report)
        steps, accumulated = int(saved.values[0]), _accumulated(saved, order)
        if steps % accumulated:
            report.note(
                f"{steps % accumulated} gradients were accumulated towards the next update: stop after a whole one",
                lossy=True,
            )
        parameters = []
        known: list[Any] = saved.known or [(None, None)] * len(order.members)
        for member, (dtype, rms) in zip(order.members, known, strict=True):
            slots = {slot: saved.values[at] for slot, at in member.slots.items()}
            slots |= {slot: wide(slots[slot]) for slot in member.layout.slots}
            parameters.append(Parameter(member.name, member.layout, slots, steps // accumulated, dtype, 0, rms))
    return State(tuple(parameters), (group,), "keras", saved.format)


def _accumulated(saved: Saved, order: Order) -> int:
    """Gradients per update."""
    if saved.config.get(STEPS):
        return int(saved.config[STEPS])
    if any(ACCUMULATOR in member.slots for member in order.members):
        remedy = f"Pass it (--set {STEPS}=4); the file has accumulators."
        raise Refused(message(STEPS, "known", None, remedy))
    return 1


def _group(saved: Saved, order: Order, report: Report) -> dict[str, Any]:
    own = {name: value for name, value in saved.config.items() if isinstance(value, str | int | float | type(None))}
    if not isinstance(saved.config.get("learning_rate"), int | float):
        own.pop("learning_rate", None)
        if "learning_rate" in saved.config:
            report.note("the learning rate is a schedule, which does not carry over: set one in the target")
    if order.learning_rate is not None:
        rate = saved.values[order.learning_rate][()]
        own["learning_rate"] = float(str(rate))  # 0.01 for the float32 next to it
    return in_our_words(saved.format, own)


# -- writing -----------------------------------------------------------------------------------------------------------


def write(
    state: State,
    template: Any,
    target: PathLike | None = None,
    *,
    names: Names | None = None,
    report: Report | None = None,
    shapes: Shapes | None = None,
    axes: Axes | None = None,
    hyperparameters: Mapping[str, Any] | None = None,
    format: str | None = None,
) -> None:
    """Put a state into an optimizer of Keras.

    Args:
        template: a built optimizer, whose variables are assigned; or the path of a ``.keras`` or ``.weights.h5`` file
            with such an optimizer in it, of which ``target`` becomes a copy with the state in place of its own.
        target: the file to write, with a template that is a file.
        shapes, axes, hyperparameters: of the template, as for :func:`read`; a ``.keras`` file tells its shapes.
        format: ``"keras"`` or ``"adafactor.keras"``, to insist on the template's class.

    Raises:
        Refused: the template does not fit. Nothing has been written.
    """
    report = Report() if report is None else report
    tells = not isinstance(template, str | os.PathLike) or zipfile.is_zipfile(template)
    saved = load(template, None if tells else shapes)
    if format is not None and saved.format != format:
        raise Refused(message("the template", f"of {format}", saved.format, "Compile the model with that class."))
    saved.config = {**saved.config, **(hyperparameters or {})}
    order = order_of(saved, axes)
    wanted = {member.name: member.layout.shape for member in order.members}
    group = adapt.one_group(state, saved.format, report)
    state = adapt.momentum_as(rename(state, names, wanted, "keras", report), saved.format, report)
    told = adapt.in_its_words(saved.format, group, report)
    for word in ("factoring", "min_dim_size_to_factor"):
        told.pop(word, None)  # as the template's are
    values = _values(state, saved, order, report)
    if order.learning_rate is not None and isinstance(told.get("learning_rate"), int | float):
        values[order.learning_rate] = np.asarray(told["learning_rate"], saved.values[order.learning_rate].dtype)
    if not isinstance(template, str | os.PathLike):
        _note_config(saved, told, report)
        for variable, value in zip(_saved_variables(template), values, strict=True):
            variable.assign(value)
        return
    if target is None:
        raise Refused(message("target", "a path, with a template that is a file", None, "Pass one."))
    with replacing(target) as new:
        if zipfile.is_zipfile(template):
            _write_archive(Path(template), new, values, told)
        else:
            new.write_bytes(Path(template).read_bytes())
            _write_h5(new, values)
            _note_config(saved, told, report)


def _values(state: State, saved: Saved, order: Order, report: Report) -> list[Array]:
    """What every position of the target will hold."""
    count = adapt.one_count(state, saved.format, report)
    values = [np.zeros_like(value) for value in saved.values]
    values[0] = np.asarray(count * _accumulated(saved, order), saved.values[0].dtype)
    if order.learning_rate is not None:
        values[order.learning_rate] = saved.values[order.learning_rate]
    known = state.named()
    extra: dict[str, list[str]] = {}
    for member in order.members:
        parameter = fitted(known[member.name], member.layout, report)
        for slot, value in parameter.slots.items():
            if slot not in member.slots:
                extra.setdefault(slot, []).append(member.name)
            else:
                at = member.slots[slot]
                values[at] = _cast(value, saved.values[at], saved.format, report)
        lacks = member.slots.keys() - parameter.slots.keys()
        if AVERAGE in lacks:  # of the weights, which the template has and the state has not
            values[member.slots[AVERAGE]] = saved.values[member.slots[AVERAGE]]
            report.dropped("The moving average", [member.name], "the source has none: the template's stays")
        if "momentum" in lacks:
            report.dropped("Momentum", [member.name], adapt.STARTS)
        if saved.format == KERAS and member.layout.factored:
            at = member.slots["column"] + 1  # the velocity
            values[at] = _velocity(parameter, saved.values[at])
    for slot, names in extra.items():
        report.dropped(slot, names, f"this {saved.format} has no such state")
    return values


def _velocity(parameter: Parameter, like: Array) -> Array:
    """What Keras's class writes beside row and column at every step and never reads: their product over the mean."""
    row, column = parameter.slots["row"], parameter.slots["column"]
    mean = row.mean(axis=-1, keepdims=True)
    scaled = np.divide(row, mean, out=np.zeros_like(row), where=mean != 0)
    product: Array = (scaled[..., None] * column[..., None, :]).astype(like.dtype)
    return product


def _cast(value: Array, like: Array, format: str, report: Report) -> Array:
    if value.dtype.itemsize > like.dtype.itemsize:
        report.note(f"{format} keeps this state in {like.dtype}: it is rounded", lossy=True)
    return value.astype(like.dtype)


def _note_config(saved: Saved, told: Mapping[str, Any], report: Report) -> None:
    """Hyperparameters that a file without a configuration, or a live optimizer, does not take from the state."""
    other = {name: value for name, value in told.items() if name != "learning_rate" and saved.config.get(name) != value}
    if other:
        arguments = ", ".join(f"{name}={value!r}" for name, value in other.items())
        report.advise(f"The optimizer's configuration is not written here: construct it with {arguments}")


def _write_h5(path: Path, values: Sequence[Array]) -> None:
    import h5py

    with h5py.File(path, "r+") as opened:
        group = opened[_VARS]
        for number, value in enumerate(values):
            group[str(number)][...] = value


def _write_archive(template: Path, new: Path, values: Sequence[Array], told: Mapping[str, Any]) -> None:
    weights = new.with_suffix(".h5")
    with zipfile.ZipFile(template) as old, zipfile.ZipFile(new, "w") as archive:
        for entry in old.infolist():
            data = old.read(entry)
            if entry.filename == _WEIGHTS:
                weights.write_bytes(data)
                _write_h5(weights, values)
                data = weights.read_bytes()
            elif entry.filename == _CONFIG:
                content = json.loads(data)
                config = content["compile_config"]["optimizer"]["config"]
                fixed = isinstance(config.get("learning_rate"), int | float)
                config |= {
                    name: value
                    for name, value in told.items()
                    if name in config and (name != "learning_rate" or (fixed and isinstance(value, int | float)))
                }
                data = json.dumps(content).encode()
            archive.writestr(entry.filename, data)
