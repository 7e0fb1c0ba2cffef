"""The text to learn: read from disk, split into training and held-out bytes, cut into windows."""

from __future__ import annotations

import os
import platform
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from adafactor.core.errors import Refused, message

CAP = 64 * 2**20  # bytes read at most: beyond what any run can look at
HELD_OUT = 10  # of a folder's files one in so many is held out; of a single file the last of so many parts
# Other people's packages, tables without sentences, and tests, which some systems leave out.
NOT_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "encodings", "pydoc_data"}

Tokens = NDArray[np.int32]


class Text(NamedTuple):
    """What was read. ``training`` and ``validation`` share no file, or no byte if there are too few files."""

    name: str
    files: int
    training: NDArray[np.uint8]
    validation: NDArray[np.uint8]

    def describe(self) -> str:
        files = f"{self.files:,} file" + "s" * (self.files != 1)
        return f"{self.name}, {files}, {len(self.training):,} bytes to learn, {len(self.validation):,} held out"

    def data(self) -> dict[str, str | int]:
        counts = {"training_bytes": len(self.training), "validation_bytes": len(self.validation)}
        return {"name": self.name, "files": self.files, **counts}


def least(context: int) -> int:
    """The smallest text, in bytes, whose held-out part surely has a window."""
    return 2 * HELD_OUT * (context + 1)


def read(path: str | None, least: int) -> Text:
    """Read a file, a folder's text files, or for None the Python standard library's sources.

    Raises:
        Refused: there is no such path, or fewer than ``least`` bytes of text in it.
    """
    remedy = "Leave --text out to learn the Python standard library."
    if path is None:
        name = f"the standard library of Python {platform.python_version()}"
        documents = load(walk(Path(sysconfig.get_path("stdlib")), ".py", NOT_LIBRARY))
        remedy = "Pass a file or folder of your own with --text."
    elif not os.path.exists(path):
        raise Refused(message("--text", "a file or folder that exists", path, "Check the path."))
    elif not os.access(path, os.R_OK):
        raise Refused(message("--text", "a file or folder that you may read", path, "Check its permissions."))
    else:
        name = path
        documents = load(walk(Path(path)) if os.path.isdir(path) else [Path(path)])
    total = sum(map(len, documents))
    if total < least:
        raise Refused(f"--text must hold at least {least:,} bytes of text, got {total:,} in {name}. {remedy}")
    learned = [document for position, document in enumerate(documents, 1) if position % HELD_OUT]
    held_out = documents[HELD_OUT - 1 :: HELD_OUT]
    if min(sum(map(len, learned)), sum(map(len, held_out))) < total // (2 * HELD_OUT):
        # Few files, or one that outweighs the rest: hold out the end of the whole.
        whole = b"\n".join(documents)
        cut = len(whole) - len(whole) // HELD_OUT
        learned, held_out = [whole[:cut]], [whole[cut:]]
    parts = (np.frombuffer(b"\n".join(part), np.uint8) for part in (learned, held_out))
    return Text(name, len(documents), *parts)


def walk(folder: Path, suffix: str = "", skip: Iterable[str] = ()) -> Iterator[Path]:
    """Files below ``folder`` in one order on every machine, without hidden ones and what links point to."""
    for root, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if name[0] not in "._" and name not in skip)
        yield from (Path(root, name) for name in sorted(files) if name[0] != "." and name.endswith(suffix))


def load(paths: Iterable[Path]) -> list[bytes]:
    """The contents of the text files among ``paths``, up to the cap. A file that cannot be read is no text."""
    documents: list[bytes] = []
    left = CAP
    for path in paths:
        try:
            data = b""
            if left and path.is_file():
                with path.open("rb") as file:
                    data = file.read(left)
        except OSError:
            continue
        if data and b"\0" not in data[:8192]:  # git's idea of a binary file
            documents.append(data)
            left -= len(data)
    return documents


def training_batch(text: Text, seed: int, step: int, batch: int, context: int) -> tuple[Tokens, Tokens]:
    """Batch number ``step`` of the run ``seed``: (batch, context) tokens, and for each the token after it.

    Random access instead of a stream, so that a resumed run sees exactly the batches it would have seen.
    """
    starts = np.random.default_rng([seed, step]).integers(0, len(text.training) - context, batch)
    return windows(text.training, starts, context)


def validation_set(text: Text, count: int, context: int) -> tuple[Tokens, Tokens]:
    """``count`` windows, spread evenly over the held-out text."""
    return windows(text.validation, np.linspace(0, len(text.validation) - context - 1, count).astype(int), context)


def windows(data: NDArray[np.uint8], starts: NDArray[np.integer], context: int) -> tuple[Tokens, Tokens]:
    window = data[starts[:, None] + np.arange(context + 1)].astype(np.int32)
    return window[:, :-1], window[:, 1:]
