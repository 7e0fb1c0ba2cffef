"""How a hostile file is opened: only regular files, only as far as a limit, JSON without surprises."""

from __future__ import annotations

import json
import os
import stat
from collections import Counter
from pathlib import Path
from typing import Any

from adafactor.core.errors import Refused, message
from adafactor.planning.parameters import cut


def regular(path: Path) -> int:
    """The size of a regular file; anything else (a pipe would wait for ever) is refused."""
    try:
        status = path.stat()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        rule = f"a file that can be read ({reason})"
        raise Refused(message("the model", rule, cut(str(path)), "Check the path.")) from None
    if not stat.S_ISREG(status.st_mode):
        raise Refused(message("the model", "a regular file", cut(str(path)), "Copy it to a file first."))
    return status.st_size


def content(path: Path, limit: int) -> bytes:
    """All of a small file."""
    size = regular(path)
    if size > limit:
        raise Refused(message(cut(path.name), f"at most {limit:,} bytes long", size, "Check the file."))
    try:
        return path.read_bytes()
    except OSError as error:
        rule = f"readable ({error.strerror})"
        raise Refused(message(cut(path.name), rule, cut(str(path)), "Check its rights.")) from None


def decode(data: bytes, name: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        got = f"something else at byte {error.start}"
        raise Refused(message(name, "text in UTF-8", got, "The file is damaged.")) from None


def parse(data: bytes, name: str) -> Any:
    """JSON in UTF-8, without duplicate keys or constants that are not JSON."""
    return parse_text(decode(data, name), name)


def parse_text(text: str, name: str) -> Any:
    def pairs(found: list[tuple[str, Any]]) -> dict[str, Any]:
        made = dict(found)
        if len(made) != len(found):
            twice = Counter(key for key, _ in found).most_common(1)[0][0]
            raise Refused(message(f"a key in {name}", "unique", cut(twice), "The file is damaged."))
        return made

    def constant(word: str) -> Any:
        raise Refused(message(f"a number in {name}", "finite", word, "The file is damaged."))

    try:
        return json.loads(text, object_pairs_hook=pairs, parse_constant=constant)
    except Refused:
        raise
    except (ValueError, RecursionError) as error:
        rule = f"JSON ({cut(str(error))})"
        raise Refused(message(name, rule, cut(text[:20]), "The file is damaged.")) from None


def shape_of(value: Any, name: str) -> tuple[int, ...]:
    """A JSON list of numbers as a shape; ``Parameter`` checks the numbers."""
    if not isinstance(value, list) or not all(type(n) is int for n in value):
        raise Refused(message(f"the shape of {cut(name)}", "a list of integers", cut(value), "Check the file."))
    return tuple(value)


def inside(folder: Path, name: object, source: str) -> Path:
    """The file of a folder that an index names.

    A name with a path in it is refused, and so is a link to somewhere else. Links of Hugging Face's cache lead from
    ``snapshots/<revision>`` to ``blobs`` beside it, which is allowed.
    """
    plain = isinstance(name, str) and name not in ("", ".", "..") and not set(name) & {"/", "\\", "\0", ":"}
    if not isinstance(name, str) or not plain:
        remedy = "Do not trust this folder."
        raise Refused(message(f"a file named in {source}", "the name of a file beside it", cut(name), remedy))
    path = folder / name
    regular(path)
    places = [folder.resolve()]
    if folder.absolute().parent.name == "snapshots":
        places.append((folder.absolute().parent.parent / "blobs").resolve())
    if not any(os.path.commonpath([place, path.resolve()]) == str(place) for place in places):
        remedy = "Do not trust this folder, or replace the link by the file."
        raise Refused(message(f"a file named in {source}", "inside its folder", cut(name), remedy))
    return path
