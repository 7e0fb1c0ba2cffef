"""The one form of every refusal."""

from __future__ import annotations


class Refused(ValueError):
    """What somebody brought cannot be used: a file, a state, a word of the command line.

    The text is one sentence with the remedy.
    """


def message(argument: str, rule: str, value: object, remedy: str) -> str:
    """One sentence: the argument, the rule, the value, the remedy."""
    return f"{argument} must be {rule}, got {value!r}. {remedy}"
