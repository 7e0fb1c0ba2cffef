"""What differs between a terminal, and a file or pipe."""

from __future__ import annotations

import io
import sys


def transient(text: str) -> None:
    """Show ``text`` on the current line until the next one replaces it; without a terminal, nothing. "" clears."""
    if sys.stdout.isatty():
        # \r returns to the line's start, \x1b[K wipes what a longer line left there.
        print(f"\r{text}\x1b[K", end="", flush=True)


def write_anything() -> None:
    """Let a stream of a small character set show "?" for what it lacks, instead of failing in mid-report."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
