"""Zip archives of other people (.keras and .pt), looked at before anything of them is unpacked."""

from __future__ import annotations

import zipfile
from pathlib import PurePosixPath

from adafactor.core.files import PathLike


def check_zip(path: PathLike) -> list[str]:
    """The names in an archive.

    PyTorch and Keras store without compression, so an archive can hold no more than its own length.

    Raises:
        ValueError: a name leads out of the archive, appears twice, or is a link; an entry is compressed, or its length
            or checksum is not what the archive says.
    """
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        for entry in archive.infolist():
            name = entry.filename
            if name.startswith(("/", "\\")) or ".." in PurePosixPath(name.replace("\\", "/")).parts or ":" in name:
                raise ValueError(f"its entry {name!r} leads out of the archive")
            if entry.external_attr >> 16 & 0o170000 == 0o120000:
                raise ValueError(f"its entry {name!r} is a link")
            if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size:
                raise ValueError(f"its entry {name!r} is compressed")
        if len(set(names)) != len(names):
            raise ValueError("it has two entries of one name")
        if sum(entry.file_size for entry in archive.infolist()) > archive.fp.seek(0, 2):  # type: ignore[union-attr]
            raise ValueError("its entries overlap")
        damaged = archive.testzip()
        if damaged is not None:
            raise ValueError(f"the checksum of its entry {damaged!r} is wrong")
    return names
