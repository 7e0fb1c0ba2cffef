"""What every command shares: how it ends, how it refuses, and how it reads numbers and finds packages."""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
from collections.abc import Callable, Iterable
from typing import NoReturn

from adafactor.cli.terminal import write_anything
from adafactor.core.errors import Refused, message


def exit_code(program: str, run: Callable[[], int]) -> int:
    """Of ``run``: 0 done, 2 refused with one sentence, 130 interrupted."""
    write_anything()
    try:
        code = run()
        sys.stdout.flush()
        return code
    except Refused as refusal:
        print(f"{program}: {refusal}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{program}: interrupted.", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of our output left (`adafactor plan | head`). Python would fail again when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


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
