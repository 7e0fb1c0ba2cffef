"""Formats that only their own library reads (HDF5, PyTorch's), in a process of their own.

A hostile file can crash a C library, or make it ask for all memory there is. Here that ends a child with a limit on
memory and time, and the caller with one sentence.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from adafactor.core.errors import Refused, message
from adafactor.core.untrusted import MAX_TENSORS, cut, regular
from adafactor.planning.parameters import Parameter

SECONDS = 120
#: Address space besides the file itself. Importing PyTorch with its GPU libraries takes most of it.
MEMORY = {"pytorch": 24 << 30, "keras": 4 << 30, "weights_h5": 4 << 30}


def read(kind: str, path: Path) -> list[Parameter]:
    """The tensors that a child finds in a file.

    Raises:
        Refused: the child refused, crashed, or was stopped.
    """
    regular(path)
    # -P: a torch.py that lies beside a hostile model is not imported.
    program = "from adafactor.planning.files.sandbox import main; main()"
    command = [sys.executable, "-P", "-c", program, kind, str(path.absolute())]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "HDF5_USE_FILE_LOCKING": "FALSE"}
    name, remedy = cut(path.name), "It may be damaged or hostile."
    try:
        done = subprocess.run(command, capture_output=True, env=environment, timeout=SECONDS, check=False)
    except subprocess.TimeoutExpired:
        raise Refused(message(name, f"read within {SECONDS} seconds", "no answer", remedy)) from None
    try:
        answer = json.loads(done.stdout)
    except ValueError:
        raise Refused(message(name, "readable", f"exit code {done.returncode} of its reader", remedy)) from None
    if "refused" in answer:
        raise Refused(answer["refused"])
    return [Parameter(name, tuple(shape), dtype, trained) for name, shape, dtype, trained in answer["tensors"]]


def _limit(kind: str, path: Path) -> None:
    try:
        import resource
    except ImportError:
        return  # Windows: the time limit is left
    most = MEMORY[kind] + path.stat().st_size
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (most if hard < 0 else min(most, hard), hard))


def main() -> None:
    """The child: print the tensors of the file that the arguments name, or why not, as JSON."""
    from adafactor.planning.files import keras, pytorch

    kind, path = sys.argv[1], Path(sys.argv[2])
    _limit(kind, path)
    reader = {"pytorch": pytorch.read, "keras": keras.open_archive, "weights_h5": keras.open_weights}[kind]
    try:
        tensors = reader(path)
        if len(tensors) > MAX_TENSORS:
            raise Refused(message(cut(path.name), f"at most {MAX_TENSORS:,} tensors", len(tensors), "Plan one part."))
        answer: dict[str, Any] = {"tensors": [(p.name, p.shape, p.dtype, p.trained) for p in tensors]}
    except ValueError as error:  # Refused, or a shape or dtype that Parameter refuses
        answer = {"refused": str(error)}
    except (MemoryError, RecursionError) as error:
        rule = f"readable with {MEMORY[kind] >> 30} GiB of memory"
        answer = {"refused": message(cut(path.name), rule, type(error).__name__, "It may be damaged or hostile.")}
    except OSError as error:
        answer = {"refused": message(cut(path.name), f"readable ({error.strerror})", str(path), "Check its rights.")}
    sys.stdout.write(json.dumps(answer))
