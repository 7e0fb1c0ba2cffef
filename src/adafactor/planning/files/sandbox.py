"""Formats that only their own library reads (HDF5, PyTorch's), in a process of their own.

A hostile file can crash a C library, or make it ask for all memory there is. Here that ends a child with a limit on
memory and time, and the caller with one sentence.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from adafactor.core.errors import Refused, message
from adafactor.planning.files.untrusted import regular
from adafactor.planning.parameters import MAX_TENSORS, Parameter, cut

SECONDS = 120
#: Address space besides the file itself. Importing PyTorch with its GPU libraries takes most of it.
MEMORY = {"pytorch": 24 << 30, "keras": 4 << 30, "weights_h5": 4 << 30}
MAX_PICKLE = 100_000_000

#: Where training programs put the model's state in a checkpoint.
_MODELS = ("state_dict", "model_state_dict", "model", "module", "params", "weights")


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


def pytorch(path: Path) -> list[Parameter]:
    """The tensors of a state dict that ``torch.save`` wrote; their memory is mapped and never touched."""
    import zipfile

    name, remedy = cut(path.name), "Save it again with torch.save(model.state_dict(), ...)."
    try:
        with zipfile.ZipFile(path) as archive:
            pickles = [info.file_size for info in archive.infolist() if info.filename.endswith("/data.pkl")]
    except (zipfile.BadZipFile, NotImplementedError, ValueError):
        raise Refused(message(name, "a zip archive, as torch.save writes it", "something else", remedy)) from None
    if len(pickles) != 1 or pickles[0] > MAX_PICKLE:
        rule = f"an archive of one data.pkl of at most {MAX_PICKLE:,} bytes"
        raise Refused(message(name, rule, cut(pickles), remedy))
    try:
        import torch
    except ImportError:
        raise Refused(f"Reading {name} needs PyTorch. Install with: pip install torch") from None
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except MemoryError:
        raise
    except Exception as error:  # whatever its unpickler trips over
        first = cut(str(error).strip().partition("\n")[0])
        raise Refused(message(name, f"a state dict of tensors ({first})", type(error).__name__, remedy)) from None
    tensors = _tensors(loaded)
    if tensors is None:
        rule = f"a state dict, or one under {', '.join(_MODELS)}"
        raise Refused(message(name, rule, type(loaded).__name__, remedy))
    found, seen = list[Parameter](), set[tuple[Any, ...]]()
    for key, tensor in tensors.items():
        place = (tensor.untyped_storage().data_ptr(), tensor.storage_offset(), tuple(tensor.shape), tensor.stride())
        if tensor.numel() and place in seen:
            continue  # tied weights are one parameter
        seen.add(place)
        dtype = str(tensor.dtype).removeprefix("torch.")
        found.append(Parameter(str(key), tuple(tensor.shape), "float8" if dtype.startswith("float8") else dtype))
    return found


def _tensors(loaded: Any) -> dict[str, Any] | None:
    import torch

    if not isinstance(loaded, Mapping):
        return None
    tensors = {key: value for key, value in loaded.items() if isinstance(value, torch.Tensor)}
    if tensors:
        return tensors
    inner = next((loaded[key] for key in _MODELS if isinstance(loaded.get(key), Mapping)), None)
    return None if inner is None else _tensors(inner)


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
    from adafactor.planning.files import keras

    kind, path = sys.argv[1], Path(sys.argv[2])
    _limit(kind, path)
    reader = {"pytorch": pytorch, "keras": keras.open_archive, "weights_h5": keras.open_weights}[kind]
    try:
        found = reader(path)
        if len(found) > MAX_TENSORS:
            raise Refused(message(cut(path.name), f"at most {MAX_TENSORS:,} tensors", len(found), "Plan one part."))
        answer: dict[str, Any] = {"tensors": [(p.name, p.shape, p.dtype, p.trained) for p in found]}
    except ValueError as error:  # Refused, or a shape or dtype that Parameter refuses
        answer = {"refused": str(error)}
    except (MemoryError, RecursionError) as error:
        rule = f"readable with {MEMORY[kind] >> 30} GiB of memory"
        answer = {"refused": message(cut(path.name), rule, type(error).__name__, "It may be damaged or hostile.")}
    except OSError as error:
        answer = {"refused": message(cut(path.name), f"readable ({error.strerror})", str(path), "Check its rights.")}
    sys.stdout.write(json.dumps(answer))
