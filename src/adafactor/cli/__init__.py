"""The command line: ``adafactor COMMAND``.

A command is a module or package beside this file with

    SUMMARY: str                           its line in ``adafactor --help``
    def add_arguments(parser): ...         its options
    def run(arguments) -> int: ...         the exit code; ``Refused`` for what cannot be done

and its name in ``COMMANDS``. All of them are imported for ``--help``, so a command imports Keras, JAX or PyTorch
inside ``run`` only.
"""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Sequence

from adafactor import __version__
from adafactor.cli.command import Parser, exit_code

#: In the order of ``adafactor --help``.
COMMANDS = ("plan", "convert", "bench", "doctor")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return the exit code: 0 done, 2 refused with one sentence, 130 interrupted."""

    def run() -> int:
        arguments = _parser().parse_args(argv)
        code: int = arguments.run(arguments)
        return code

    return exit_code("adafactor", run)


def _parser() -> Parser:
    parser = Parser(
        prog="adafactor",
        description="Adafactor for Keras, PyTorch and JAX: one algorithm, one state, almost no optimizer memory.",
    )
    parser.add_argument("--version", action="version", version=f"adafactor {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    for name in COMMANDS:
        module = importlib.import_module(f"adafactor.cli.{name}")
        command = commands.add_parser(
            name,
            help=module.SUMMARY,
            description=module.__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(command)
        command.set_defaults(run=module.run)

    def no_command(_: argparse.Namespace) -> int:
        parser.print_help()
        return 0

    parser.set_defaults(run=no_command)
    return parser
