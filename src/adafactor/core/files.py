"""Files that are there whole or not at all."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from adafactor.core.errors import message

PathLike = str | os.PathLike[str]


@contextlib.contextmanager
def replacing(path: PathLike) -> Iterator[Path]:
    """A name in the folder of ``path`` to write a file or a folder under; it becomes ``path`` when the block ends well.

    What was at ``path`` stays until everything is on the disk, and stays for good when the block raises. A file gets
    the rights of any new file, whatever its writer thinks of that.

    Raises:
        FileNotFoundError: the folder does not exist.
        IsADirectoryError: a file would replace a folder.
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(message("the target", "in a folder that exists", str(path), "Make the folder first."))
    scratch = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        new = scratch / path.name
        yield new
        if new.is_file():
            if path.is_dir():
                raise IsADirectoryError(message("the target", "a file's name", str(path), "A folder has this name."))
            fresh = scratch / f"{path.name}.fresh"
            fresh.touch()
            new.chmod(fresh.stat().st_mode)
            with open(new, "rb+") as file:
                os.fsync(file.fileno())
        old = scratch / f"{path.name}.old"
        if new.is_dir() and path.exists():  # os.replace has no word for a folder that is not empty
            os.replace(path, old)
        try:
            os.replace(new, path)
        except OSError:
            if old.exists():
                os.replace(old, path)
            raise
        _sync_folder(path.parent)
    finally:
        shutil.rmtree(scratch)


def _sync_folder(folder: Path) -> None:
    if os.name == "posix":  # elsewhere a folder cannot be opened
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
