"""What commands show: tables, and what differs between a terminal, and a file or pipe."""

from __future__ import annotations

import io
import sys
from collections.abc import Sequence


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A header, a rule and the rows; the first column to the left, the figures to the right."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]

    def text(line: Sequence[str]) -> str:
        first, *figures = zip(line, widths, strict=True)
        return "   ".join([first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in figures)]).rstrip()

    rule = "─" * (sum(widths) + 3 * (len(widths) - 1))
    return "\n".join([text(header), rule, *map(text, rows)])


def transient(text: str) -> None:
    """Show ``text`` on the current line until the next one replaces it; without a terminal, nothing. "" clears."""
    if sys.stdout is not None and sys.stdout.isatty():
        # \r returns to the line's start, \x1b[K wipes what a longer line left there.
        print(f"\r{text}\x1b[K", end="", flush=True)


def write_anything() -> None:
    """Let a stream of a small character set show "?" for what it lacks, instead of failing in mid-report."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
