"""Optimizer state from one framework to another: ``docs/state.md``.

``read`` makes an :class:`State` of a checkpoint, ``write`` a checkpoint of a State, ``convert`` does
both. The converters beside this file do the work and take live objects too:

    adafactor.convert.torch    torch.optim.Adafactor, transformers' Adafactor, adafactor.torch
    adafactor.convert.jax      optax.adafactor, adafactor.optax, T5X
    adafactor.convert.keras    keras.optimizers.Adafactor, adafactor.keras

No framework is imported before a file of its own is read or written.
"""

from __future__ import annotations

import os
import zipfile
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from adafactor.convert import state as states
from adafactor.convert.adapt import check
from adafactor.convert.axes import Axes, Shapes
from adafactor.convert.names import Names, rename
from adafactor.convert.report import Change, Report
from adafactor.convert.state import State
from adafactor.core.dialects import FORMATS
from adafactor.core.errors import Refused, message
from adafactor.core.files import PathLike
from adafactor.core.untrusted import reading, regular

STATE = "state"
#: Everything that ``format`` can be, and of that what is written.
NAMES = (STATE, *FORMATS)
WRITTEN = (STATE, *(name for name, dialect in FORMATS.items() if dialect.written))
#: What files with these endings hold everywhere.
_ENDINGS = {
    ".safetensors": STATE,
    ".pt": "torch",
    ".pth": "torch",
    ".keras": "keras",
    ".h5": "keras",
    ".msgpack": "jax",
}
_H5 = b"\x89HDF\r\n\x1a\n"


def family_of(path: PathLike) -> str:
    """``state``, ``torch``, ``keras`` or ``jax``: which converter reads a file or folder, by its content.

    Raises:
        Refused: none of them.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(message("the file", "there", str(path), "Check the name."))
    if path.is_dir():
        if (path / ".metadata").is_file():
            remedy = "Make a .pt file with torch.distributed.checkpoint.format_utils.dcp_to_torch_save."
            raise Refused(message("the folder", "an Orbax checkpoint", "a distributed checkpoint of PyTorch's", remedy))
        return "jax"  # Orbax
    with reading(path, "a checkpoint"):
        regular(path, "the file")
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                names = archive.namelist()
            if "config.json" in names:
                return "keras"
            if any(name.endswith("/data.pkl") for name in names):
                return "torch"
            raise ValueError("it is a zip archive of another kind")
        with open(path, "rb") as file:
            start = file.read(9)
        if start.startswith(_H5):
            return "keras"
        if states.is_state(path):
            return STATE
        if path.suffix == ".safetensors" or start[8:9] == b"{":
            raise ValueError("it is a safetensors file without the metadata of a state, or a damaged one")
        if start[:1] == b"\x80":
            raise ValueError("it is a pickle, or of PyTorch before 1.6, whose torch.save can write it anew")
        if start and (start[0] >> 4 == 8 or start[0] in (0xDE, 0xDF)):
            return "jax"  # msgpack of a mapping
        raise ValueError("it is neither safetensors, .pt, .keras, .h5, msgpack nor an Orbax folder")


def read(
    source: PathLike,
    format: str | None = None,
    *,
    report: Report | None = None,
    shapes: Shapes | None = None,
    axes: Axes | None = None,
    hyperparameters: Mapping[str, Any] | None = None,
) -> State:
    """The state in a file or folder of any format.

    Args:
        format: one of ``NAMES`` to insist on it; ``None`` takes what it is.
        report: receives what does not carry over.
        shapes: parameters' shapes by name, in order, where the file leaves them open.
        axes: ``adafactor.Factored`` by name, where the file leaves them open.
        hyperparameters: what the file does not tell, or tells otherwise, in the project's names.

    Raises:
        FileNotFoundError: there is nothing.
        Refused: it cannot be read; the text is one sentence with the remedy.
    """
    report = Report() if report is None else report
    _known(format)
    check(hyperparameters or {})
    family = family_of(source)
    if family == STATE:
        state, written_by = states.read(source), STATE
    else:
        more = {"hyperparameters": hyperparameters} if family == "keras" else {}
        state = _converter(family).read(os.fspath(source), report=report, shapes=shapes, axes=axes, **more)
        written_by = state.optimizer
    if format not in (None, written_by):
        raise Refused(message(f"{source}", f"of {format}", written_by, f"Leave --from out, or pass {written_by}."))
    return state.with_hyperparameters(hyperparameters) if hyperparameters else state


def write(
    state: State,
    target: PathLike,
    format: str,
    *,
    template: PathLike | None = None,
    names: Names | None = None,
    report: Report | None = None,
    shapes: Shapes | None = None,
    axes: Axes | None = None,
    template_hyperparameters: Mapping[str, Any] | None = None,
) -> Report:
    """Write a state as a file or folder of a format, which is there whole or not at all.

    Args:
        target: ``*.safetensors``, ``*.pt``, ``*.keras``, ``*.weights.h5``, ``*.msgpack``, or a folder for Orbax.
        format: one of ``NAMES``.
        template: a file of the target's format whose optimizer state is replaced: needed for Keras, and for the others
            where names, order or groups matter.
        names: parameters by the target's names; see :mod:`adafactor.convert.names`.
        shapes, axes, template_hyperparameters: of the template, where it does not tell.

    Returns:
        What changed, and what did not carry over.

    Raises:
        FileNotFoundError: the target's folder does not exist.
        Refused: something does not fit. Nothing has been written.
    """
    report = Report() if report is None else report
    _known(format)
    if format not in WRITTEN:
        raise Refused(message("the target's format", f"one of {', '.join(WRITTEN)}", format, "It is only read."))
    family = STATE if format == STATE else FORMATS[format].framework
    if _ENDINGS.get(Path(target).suffix, family) != family:
        rule = " or ".join(ending for ending, its in _ENDINGS.items() if its == family)
        raise Refused(message("the target's name", f"with {rule} for {format}", str(target), "Pass another name."))
    if format == STATE:
        states.write(rename(state, names, None, state.framework, report), target)
        report.changes.extend(Change(parameter.name, "kept") for parameter in state.parameters)
        return report
    path = None if template is None else os.fspath(template)
    converter, told = _converter(family), {"names": names, "report": report}
    if family == "keras":
        if path is None:
            raise Refused(message("template", "a .keras or .weights.h5 file", None, "Save the target's model once."))
        told |= {"shapes": shapes, "axes": axes, "hyperparameters": template_hyperparameters, "format": format}
        converter.write(state, path, target, **told)
    else:
        converter.save(converter.write(state, format, template=path, **told), target)
    return report


def convert(
    source: PathLike,
    target: PathLike,
    to: str,
    *,
    format: str | None = None,
    template: PathLike | None = None,
    names: Names | None = None,
    shapes: Shapes | None = None,
    axes: Axes | None = None,
    hyperparameters: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> Report:
    """``read`` and ``write``. ``shapes`` and ``axes`` are of the source, or of a template that does not tell its own.

    Args:
        overwrite: whether ``target`` may be the source or the template itself.

    Returns:
        What changed, and what did not carry over.
    """
    for each in (source, template):
        there = each is not None and Path(target).exists() and Path(each).exists()
        if there and not overwrite and Path(target).samefile(str(each)):
            raise Refused(message("the target", "another file", str(target), "Pass overwrite=True to replace it."))
    report = Report()
    state = read(source, format, report=report, shapes=shapes, axes=axes, hyperparameters=hyperparameters)
    return write(state, target, to, template=template, names=names, report=report, shapes=shapes, axes=axes)


def _converter(framework: str) -> Any:
    return import_module(f"adafactor.convert.{framework}")


def _known(format: str | None) -> None:
    if format is not None and format not in NAMES:
        raise Refused(message("the format", f"one of {', '.join(NAMES)}", format, "Leave --from out to find out."))
