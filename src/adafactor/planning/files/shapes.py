"""Shapes written by hand: ``4096x4096*32 4096`` on the command line or in a file, or JSON."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from adafactor.core.errors import Refused, message
from adafactor.core.untrusted import MAX_TENSORS, content, cut, decode, parse, shape_of
from adafactor.planning.parameters import Parameter

MAX_FILE = 32_000_000

_WORD = re.compile(r"(?:(?P<shape>\d{1,19}(?:x\d{1,19})*)|scalar)(?:\*(?P<count>[1-9]\d{0,6}))?", re.ASCII)
_RULE = "a shape like 4096x4096, 4096 or scalar, *32 after it for 32 of them"


def is_shape(word: str) -> bool:
    """Whether a word of the command line is a shape rather than a file."""
    return _WORD.fullmatch(word) is not None


def parse_words(words: Iterable[str]) -> list[Parameter]:
    """Tensors of the shapes, named by what was written."""
    tensors: list[Parameter] = []
    for word in words:
        match = _WORD.fullmatch(word)
        if match is None:
            raise Refused(message("a shape", _RULE, cut(word), "Separate shapes by spaces."))
        shape = tuple(int(n) for n in (match["shape"] or "").split("x") if n)
        count = int(match["count"] or 1)
        if len(tensors) + count > MAX_TENSORS:
            remedy = "Plan one part at a time."
            raise Refused(message("the shapes", f"at most {MAX_TENSORS:,}", f"{len(tensors) + count:,}", remedy))
        tensors += [Parameter(f"shape {len(tensors) + i} ({match['shape'] or 'scalar'})", shape) for i in range(count)]
    return tensors


def read_text(path: Path) -> list[Parameter]:
    """Words as on the command line; what follows a # is a comment."""
    text = decode(content(path, MAX_FILE), cut(path.name))
    return parse_words(word for line in text.splitlines() for word in line.partition("#")[0].split())


def read_json(path: Path) -> list[Parameter]:
    """``{"name": [4096, 4096]}``, ``[[4096, 4096], [4096]]`` or ``["4096x4096*32", "4096"]``."""
    source = cut(path.name)
    value = parse(content(path, MAX_FILE), source)
    if isinstance(value, dict):
        pairs = list(value.items())
    elif isinstance(value, list) and all(isinstance(word, str) for word in value):
        return parse_words(value)
    elif isinstance(value, list):
        pairs = [(f"shape {position}", shape) for position, shape in enumerate(value)]
    else:
        raise Refused(message(source, "an object or a list of shapes", cut(value), "docs/planning.md has examples."))
    if len(pairs) > MAX_TENSORS:
        raise Refused(message(f"the shapes in {source}", f"at most {MAX_TENSORS:,}", len(pairs), "Plan one part."))
    return [Parameter(name, shape_of(shape, name)) for name, shape in pairs]
