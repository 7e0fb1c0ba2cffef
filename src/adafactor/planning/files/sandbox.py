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
#: Address space besides the file itself (importing PyTorch with its GPU libraries takes most), and what that must be.
KINDS = {
    "pytorch": (24 << 30, "a state dict of tensors", "Save it again with torch.save(model.state_dict(), ...)."),
    "keras": (4 << 30, "HDF5 in a zip archive, as Keras writes it", "The file is damaged or not Keras's."),
    "weights_h5": (4 << 30, "HDF5 as Keras writes it", "The file is damaged or not Keras's."),
}


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


def _limit(most: int) -> None:
    try:
        import resource
    except ImportError:
        return  # Windows: the time limit is left
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (most if hard < 0 else min(most, hard), hard))


def main() -> None:
    """The child: print the tensors of the file that the arguments name, or why not, as JSON."""
    from adafactor.planning.files import keras, pytorch

    kind, path = sys.argv[1], Path(sys.argv[2])
    memory, what, remedy = KINDS[kind]
    name = cut(path.name)
    _limit(memory + path.stat().st_size)
    reader = {"pytorch": pytorch.read, "keras": keras.open_archive, "weights_h5": keras.open_weights}[kind]
    answer: dict[str, Any]
    try:
        tensors = reader(path)
        if len(tensors) > MAX_TENSORS:
            raise Refused(message(name, f"at most {MAX_TENSORS:,} tensors", len(tensors), "Plan one part."))
        answer = {"tensors": [(p.name, p.shape, p.dtype, p.trained) for p in tensors]}
    except Refused as refusal:
        answer = {"refused": str(refusal)}
    except ImportError as error:
        answer = {"refused": f"Reading {name} needs {error.name}. Install with: pip install {error.name}"}
    except (MemoryError, RecursionError) as error:
        rule = f"readable with {memory >> 30} GiB of memory"
        answer = {"refused": message(name, rule, type(error).__name__, "It may be damaged or hostile.")}
    except PermissionError as error:
        answer = {"refused": message(name, f"readable ({error.strerror})", str(path), "Check its rights.")}
    except Exception as error:  # whatever a library trips over
        rule = f"{what} ({cut(str(error).strip().partition(chr(10))[0])})"
        answer = {"refused": message(name, rule, type(error).__name__, remedy)}
    sys.stdout.write(json.dumps(answer))
