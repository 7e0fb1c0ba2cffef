"""Convert optimizer state between frameworks, exactly where that is possible, and say where it is not.

SOURCE and TARGET are files: .safetensors (our own state file), .pt, .keras, .weights.h5, .msgpack, or an Orbax folder.
What SOURCE is, its content tells. Formats: state, keras, adafactor.keras, torch.optim, transformers, adafactor.torch,
optax, adafactor.optax, t5x. docs/state.md has examples.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from adafactor.cli.command import check_output, need
from adafactor.core.errors import Refused, message

SUMMARY = "move a checkpoint's optimizer state to another framework"

_PACKAGES = {
    "state": ("safetensors",),
    "keras": ("keras", "h5py"),
    "torch": ("torch",),
    "jax": ("msgpack", "jax", "optax"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    from adafactor.convert import NAMES, WRITTEN

    parser.add_argument("source", metavar="SOURCE", type=Path, help="a checkpoint with the state of Adafactor")
    parser.add_argument("--to", required=True, metavar="FORMAT", choices=WRITTEN, help="format of TARGET")
    parser.add_argument(
        "-o", "--output", required=True, metavar="TARGET", type=Path, help="the file or folder to write"
    )
    parser.add_argument("--from", dest="format", metavar="FORMAT", choices=NAMES, help="insist on SOURCE's format")
    parser.add_argument("--template", type=Path, help="a file of the target's format whose optimizer state is replaced")
    parser.add_argument("--names", metavar="FILE", help="a names file, or one of the words layers, position")
    parser.add_argument(
        "--shapes", type=Path, metavar="FILE", help="parameters' shapes: JSON {name: shape}, or their safetensors"
    )
    parser.add_argument(
        "--axes", type=Path, metavar="FILE", help='JSON {name: {"rows": [0], "columns": [1, 2]}} or null'
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="a hyperparameter SOURCE does not tell"
    )
    parser.add_argument("--report", type=Path, metavar="FILE.json", help="write what changed as JSON")
    parser.add_argument("--force", action="store_true", help="replace TARGET if it exists, even if it is SOURCE")


def run(arguments: argparse.Namespace) -> int:
    """Convert and print the report; 0 also where something had to be rebuilt, because the report says so."""
    from adafactor import convert
    from adafactor.convert import names
    from adafactor.core.dialects import FORMATS
    from adafactor.core.files import replacing

    source, target = arguments.source, arguments.output
    try:
        for what, path in (("TARGET", target), ("--report", arguments.report)):
            if path is not None and path.exists() and not arguments.force:
                raise Refused(message(what, "a new name", str(path), "Pass --force to replace it."))
        words = None if arguments.names in names.WORDS else arguments.names
        named = [arguments.shapes, arguments.axes, words]
        check_output("TARGET", target, named)
        if arguments.report is not None:
            check_output("--report", arguments.report, [source, target, arguments.template, *named])
        family = convert.family_of(source)
        for each in (family, "state" if arguments.to == "state" else FORMATS[arguments.to].framework):
            need(_PACKAGES[each], f"adafactor convert with files of {each}", f"pip install {' '.join(_PACKAGES[each])}")
        report = convert.convert(
            source,
            target,
            arguments.to,
            format=arguments.format,
            template=arguments.template,
            names=arguments.names if arguments.names in (None, *names.WORDS) else names.load(arguments.names),
            shapes=_shapes(arguments.shapes),
            axes=_axes(arguments.axes),
            hyperparameters=dict(map(_setting, arguments.set)),
            overwrite=arguments.force,
        )
        if arguments.report is not None:
            with replacing(arguments.report) as new:
                new.write_text(json.dumps(report.as_dict(), indent=2) + "\n", encoding="utf-8")
    except (ValueError, OSError, ImportError) as error:
        raise Refused(str(error)) from error
    print(f"{source} -> {target}, {arguments.to}: {'exact' if report.exact else 'NOT exact'}")
    print(report.text())
    return 0


def _shapes(path: Path | None) -> Any:
    from adafactor.core.safetensors import header

    if path is not None and path.suffix == ".safetensors":
        return {tensor.name: tensor.shape for tensor in header(path)[0]}

    def shape(value: Any) -> tuple[int, ...]:
        if not all(type(n) is int and n >= 0 for n in value):
            raise ValueError("a shape must be a list of integers >= 0")
        return tuple(value)

    return _by_name(path, "shapes", shape)


def _axes(path: Path | None) -> Any:
    from adafactor.core.factoring import Factored

    def factored(value: Any) -> Factored | None:
        return None if value is None else Factored(**{role: tuple(axes) for role, axes in value.items()})

    return _by_name(path, "axes", factored)


def _by_name(path: Path | None, what: str, made: Callable[[Any], Any]) -> dict[str, Any] | None:
    from adafactor.core.untrusted import reading

    if path is None:
        return None
    with reading(path, f"JSON of names and {what}"):
        return {name: made(value) for name, value in json.loads(path.read_text(encoding="utf-8")).items()}


def _setting(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier():
        raise Refused(message("--set", "NAME=VALUE", text, "For instance --set learning_rate=0.001."))
    try:
        return name, json.loads(value)
    except ValueError:
        return name, {"None": None, "True": True, "False": False}.get(value, value)
