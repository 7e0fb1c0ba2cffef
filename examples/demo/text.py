"""The text to learn: read from disk, split into training and held-out bytes, cut into windows."""

from __future__ import annotations

import os
import platform
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from adafactor.cli.command import Refusal
from adafactor.core.errors import message

#: Bytes read at most: beyond what any run of the demo can look at.
CAP = 64 * 2**20
#: Of the files of a folder, one in so many is held out; of the bytes of a single file, the last of so many parts.
HELD_OUT = 10

Bytes = NDArray[np.uint8]
Tokens = NDArray[np.int32]

# Other people's packages, tables without sentences, and tests, which some systems leave out.
_NOT_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "encodings", "pydoc_data"}


@dataclass(frozen=True, slots=True)
class Text:
    """What was read. ``training`` and ``validation`` share no file, or no byte if there are too few files."""

    name: str
    files: int
    training: Bytes
    validation: Bytes

    def describe(self) -> str:
        files = f"{self.files:,} file" + "s" * (self.files != 1)
        return f"{self.name}, {files}, {len(self.training):,} bytes to learn, {len(self.validation):,} held out"


def least(context: int) -> int:
    """The smallest text, in bytes, whose held-out part surely has a window."""
    return 2 * HELD_OUT * (context + 1)


def read(path: str | None, least: int) -> Text:
    """Read a file, a folder's text files, or by default the Python standard library's sources.

    Args:
        path: what the user named; ``None`` for the standard library.
        least: bytes below which there is nothing to learn.

    Raises:
        Refusal: there is no such path, or too little text in it.
    """
    remedy = "Leave --text out to learn the Python standard library."
    if path is None:
        name = f"the standard library of Python {platform.python_version()}"
        documents = _load(_walk(Path(sysconfig.get_path("stdlib")), ".py", _NOT_LIBRARY))
        remedy = "Pass a file or folder of your own with --text."
    elif not (os.path.isfile(path) or os.path.isdir(path)):
        raise Refusal(message("--text", "a file or folder that exists", path, "Check the path."))
    elif not os.access(path, os.R_OK):
        raise Refusal(message("--text", "a file or folder that you may read", path, "Check its permissions."))
    else:
        name = path
        documents = _load(_walk(Path(path)) if os.path.isdir(path) else iter([Path(path)]))
    total = sum(map(len, documents))
    if total < least:
        raise Refusal(f"--text must hold at least {least:,} bytes of text, got {total:,} in {name}. {remedy}")
    held_out = documents[HELD_OUT - 1 :: HELD_OUT]
    if min(sum(map(len, held_out)), total - sum(map(len, held_out))) >= total // (2 * HELD_OUT):
        learned = [document for position, document in enumerate(documents, 1) if position % HELD_OUT]
    else:  # few files, or one that outweighs the rest: hold out the end of the whole
        whole = b"\n".join(documents)
        cut = len(whole) - len(whole) // HELD_OUT
        learned, held_out = [whole[:cut]], [whole[cut:]]
    return Text(name, len(documents), _join(learned), _join(held_out))


def training_batch(text: Text, seed: int, step: int, batch: int, context: int) -> tuple[Tokens, Tokens]:
    """Batch number ``step`` of the run ``seed``: (batch, context) tokens, and for each the token after it.

    Random access instead of a stream, so that a resumed run sees exactly the batches it would have seen.
    """
    starts = np.random.default_rng([seed, step]).integers(0, len(text.training) - context, batch)
    return _windows(text.training, starts, context)


def validation_set(text: Text, windows: int, context: int) -> tuple[Tokens, Tokens]:
    """``windows`` windows, spread evenly over the held-out text."""
    starts = np.linspace(0, len(text.validation) - context - 1, windows).astype(np.int64)
    return _windows(text.validation, starts, context)


def _windows(data: Bytes, starts: NDArray[np.int64], context: int) -> tuple[Tokens, Tokens]:
    window = data[starts[:, None] + np.arange(context + 1)].astype(np.int32)
    return window[:, :-1], window[:, 1:]


def _walk(folder: Path, suffix: str = "", skip: set[str] | None = None) -> Iterator[Path]:
    """Files below ``folder`` in one order on every machine, without hidden ones and what links point to."""
    for root, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if name[0] not in "._" and name not in (skip or ()))
        for name in sorted(files):
            path = Path(root, name)
            if name[0] != "." and name.endswith(suffix) and path.is_file():
                yield path


def _load(paths: Iterator[Path]) -> list[bytes]:
    """The contents of the text files among ``paths``, up to the cap. A file that cannot be read is no text."""
    documents: list[bytes] = []
    left = CAP
    for path in paths:
        if left <= 0:
            break
        try:
            with path.open("rb") as file:
                data = file.read(left)
        except OSError:
            continue
        if data and b"\0" not in data[:8192]:  # git's idea of a binary file
            documents.append(data)
            left -= len(data)
    return documents


def _join(documents: list[bytes]) -> Bytes:
    return np.frombuffer(b"\n".join(documents), np.uint8)
