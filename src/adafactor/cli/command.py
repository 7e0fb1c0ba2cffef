"""What every command shares: how it ends, how it refuses, its options, its files, and programs of their own."""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NoReturn

from adafactor.cli.terminal import write_anything
from adafactor.core.errors import Refused, message


def exit_code(program: str, run: Callable[[], int]) -> int:
    """Of ``run``: 0 done, 1 its output was not wanted, 2 refused with one sentence, 130 interrupted."""
    write_anything()
    try:
        code = run()
        print(end="", flush=True)
        return code
    except Refused as refusal:
        print(f"{program}: {refusal}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{program}: interrupted.", file=sys.stderr)
        return 130
    except OSError as error:
        try:
            print(end="", flush=True)
        except OSError:
            # The reader of our output left (`adafactor plan | head`), or the disk is full. Python would fail again when
            # it flushes at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):
            return 1
        print(f"{program}: {error}.", file=sys.stderr)
        return 2


class Parser(argparse.ArgumentParser):
    """``ArgumentParser`` that refuses in one sentence instead of a usage page."""

    def error(self, message: str) -> NoReturn:
        failed = sys.exc_info()[1]
        if failed is not None and isinstance(failed.__context__, argparse.ArgumentTypeError):
            raise Refused(str(failed.__context__)) from None  # a sentence of ours, which argparse would rephrase
        raise Refused(f"{message.rstrip('.')}. See {self.prog} --help.") from None


def integer(option: str, low: int, high: int | None = None) -> Callable[[str], int]:
    """An argparse type: an integer in [low, high]."""
    rule = f"an integer >= {low}" if high is None else f"an integer from {low} to {high}"

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = low - 1
        if value < low or (high is not None and value > high):
            remedy = "Leave the option out for the default."
            raise argparse.ArgumentTypeError(message(option, rule, text, remedy))
        return value

    return parse


def need(packages: Iterable[str], what: str, install: str) -> None:
    """Refuse before any work is done when a package is missing.

    Args:
        packages: import names.
        what: who needs them, for the sentence.
        install: the command that brings them.
    """
    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    if missing:
        raise Refused(f"{what} needs {' and '.join(missing)}. Install with: {install}")


def check_output(option: str, file: str | Path, others: Iterable[str | Path | None]) -> None:
    """Refuse before the work a file that could not be written after it, or that others would be lost for."""
    path = Path(file)
    if not (path.parent.is_dir() and os.access(path.parent, os.W_OK)):
        raise Refused(message(option, "a file in a folder that can be written", str(file), "Pass another."))
    if any(path.resolve() == Path(other).resolve() for other in others if other is not None):
        raise Refused(message(option, "a file of its own", str(file), "It would replace another; pass another name."))


def check_outputs(command: str, arguments: argparse.Namespace, models: Sequence[Path] = ()) -> None:
    """Refuse before the work what ``--json`` and ``--plot`` could not write after it."""
    if arguments.json not in (None, "-"):
        check_output("--json", arguments.json, [*models, arguments.plot])
    if arguments.plot:
        check_output("--plot", arguments.plot, models)
        need(("matplotlib",), f"adafactor {command} --plot", "pip install matplotlib")
        from matplotlib.backend_bases import FigureCanvasBase

        suffix, known = Path(arguments.plot).suffix[1:].lower(), FigureCanvasBase.get_supported_filetypes()
        if suffix and suffix not in known:
            raise Refused(message("--plot", f"a file that ends in {', '.join(known)}", arguments.plot, "Try .png."))


def write_outputs(arguments: argparse.Namespace, data: str, draw: Callable[[Path], None]) -> None:
    """Write the files of ``--json`` and ``--plot``."""
    try:
        if arguments.json is not None:
            Path(arguments.json).write_text(data + "\n", encoding="utf-8")
        if arguments.plot:
            draw(Path(arguments.plot))
    except (OSError, ValueError) as error:
        raise Refused(message("--json and --plot", "files that can be written", str(error), "Pass others.")) from None


def python(program: str, *arguments: str) -> list[str]:
    """A command for a process of its own, which imports nothing that happens to lie in the current folder (``-P``)."""
    return [sys.executable, "-P", "-c", program, *arguments]
