"""The native kernels: measure, apply and step for a whole list of CPU tensors in one call.

The library is loaded with ctypes at the first question, never at import, and without it everything else works.
``native/adafactor.h`` is the other side of this file. Two environment variables decide for every caller:

    ADAFACTOR_ISA           baseline, avx2 or avx512: the instruction set. Default: the best that the processor has.
    ADAFACTOR_NUM_THREADS   threads of a call, 1 and up. Default: what the caller asks for, else the processors
                            that this process may use.
"""

from __future__ import annotations

import ctypes
import os
import sys
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from adafactor.core.canonical import Canonical, canonical
from adafactor.core.errors import message
from adafactor.core.hyperparameters import Hyperparameters

__all__ = ["DTYPES", "Canonical", "Table", "available", "canonical", "info", "path", "threads", "why_not"]

ISAS = ("baseline", "avx2", "avx512")
DTYPES = {"float32": 0, "bfloat16": 1, "float16": 2, "float64": 3}

FACTORED, SCALE_PARAMETER, SCALE_AFTER_DECAY, MAXIMIZE, SKIP_NONFINITE, STOCHASTIC_ROUNDING, Q_KNOWN, COLUMNS_FIRST = (
    1 << bit for bit in range(8)
)
ROW_SUMS, ROWS_SUMMED, MATRIX_SUMS, TOTALS = (1 << bit for bit in range(8, 12))

_ADDRESSES = [
    *("param", "target", "grad", "row", "column", "momentum", "momentum_target", "residual"),
    *("Q", "finished", "S", "W", "step_size", "matrix_sums", "mu", "u2", "count", "diagnostics"),
]
_NUMBERS = [
    "outer",
    "rows",
    "inner",
    "columns",
    "slices",
    "global_rows",
    "global_size",
    "global_columns",
    "row_offset",
    "column_offset",
]
_CODES = ["param_dtype", "grad_dtype", "momentum_dtype"]
_SCALARS = ["rho", "ema_weight", "eps1", "eps2", "clip", "decay_factor", "beta1"]
#: ``adafactor_tensor``, field by field.
RECORD = np.dtype(
    [(name, np.uint64) for name in _ADDRESSES]
    + [(name, np.int64) for name in (*_NUMBERS, *_CODES)]
    + [("flags", np.uint64)]
    + [(name, np.float64) for name in _SCALARS]
    + [("seed", np.uint64), ("step", np.uint64), ("rng_stream", np.uint64), ("skipped", np.int64)]
)
_ABI = 5 * 65536 + RECORD.itemsize

Verb = Literal["measure", "finish", "apply", "step"]


@dataclass(frozen=True)
class Info:
    """Which native kernels run: for ``adafactor doctor``."""

    path: str
    isa: str
    built: tuple[str, ...]
    supported: tuple[str, ...]
    threads: int


@dataclass(frozen=True)
class _Library:
    path: str
    verbs: dict[str, Any]
    number: Any
    use_openmp: Any
    ask: Any
    built: tuple[str, ...]
    supported: tuple[str, ...]


def available() -> bool:
    """Whether the native kernels can run here. Raises ValueError where ``ADAFACTOR_ISA`` asks for the impossible."""
    if isinstance(_load(), str):
        return False
    isa()
    return True


def why_not() -> str | None:
    """One sentence that says why the native kernels cannot run, or ``None`` where they can."""
    library = _load()
    return library if isinstance(library, str) else None


def info() -> Info:
    """Path, instruction sets and threads. Raises RuntimeError where the kernels are not available."""
    library = _library()
    return Info(library.path, ISAS[isa()], library.built, library.supported, threads())


def isa() -> int:
    """The code of the instruction set in use."""
    library = _library()
    asked = os.environ.get("ADAFACTOR_ISA", "").strip()
    if not asked:
        return ISAS.index(library.supported[-1])
    if asked not in library.supported:
        remedy = f"This machine runs {', '.join(library.supported)}; unset it for the best."
        raise ValueError(message("ADAFACTOR_ISA", f"one of {', '.join(ISAS)}", asked, remedy))
    return ISAS.index(asked)


def threads(asked: int | None = None) -> int:
    """How many threads a call uses: ``ADAFACTOR_NUM_THREADS``, else ``asked``, else the processors we may use."""
    variable = os.environ.get("ADAFACTOR_NUM_THREADS", "").strip()
    if variable:
        if not (variable.isascii() and variable.isdigit() and 1 <= int(variable) <= 1024):
            remedy = "Unset it to use every processor."
            raise ValueError(message("ADAFACTOR_NUM_THREADS", "a whole number from 1 to 1024", variable, remedy))
        return int(variable)
    if asked is not None:
        return asked
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def use_openmp(file: str) -> bool:
    """Runs calls on the threads of the OpenMP that the library ``file`` is linked with, where they are enough.

    After each of its operations OpenMP has its threads spin for some milliseconds, in the way of threads of our own.
    False, and nothing changed, where that runtime is not one of GNU's interface (on Linux it is).
    """
    try:
        openmp = ctypes.CDLL(file)
        functions = [ctypes.cast(f, ctypes.c_void_p) for f in (openmp.GOMP_parallel, openmp.omp_get_max_threads)]
    except (OSError, AttributeError):
        return False
    _library().use_openmp(*functions)
    return True


class Asked:
    """Functions of a framework's C interface, to be asked about many of its objects in one call.

    Args:
        functions: their addresses. Each takes an object's address and a place for an int64, and returns 0.
        offset: what they take is so many bytes behind an object of Python.
    """

    def __init__(self, functions: Sequence[int], offset: int) -> None:
        self._functions, self._offset = (ctypes.c_void_p * len(functions))(*functions), offset

    def about(self, ids: array[int]) -> NDArray[np.int64] | None:
        """[functions, objects]: the answers, 0 for ``None``; ``None`` where a function failed. ``ids``: of "q".

        The interpreter's lock is kept: nobody changes the objects meanwhile.
        """
        answers: Any = (ctypes.c_int64 * (len(self._functions) * len(ids)))()
        error = _library().ask(
            self._functions, len(self._functions), ids.buffer_info()[0], len(ids), self._offset, id(None), answers
        )
        return None if error else np.frombuffer(answers, np.int64).reshape(len(self._functions), -1)


class Table:
    """The descriptors of a list of tensors, kept from step to step.

    ``records`` is a NumPy array of ``adafactor_tensor``, one per tensor. Set what never changes once, with `bind`,
    and every step only what does: ``table.records["grad"] = addresses``, and `configure` for the numbers of a group.

    Args:
        forms: the canonical form of each tensor.

    Attributes:
        records: the descriptors, of dtype `RECORD`.
        Q: per tensor a view of its sums of x², one per slice. After a step: those of the new x, as stored.
        sums: after `allocate_sums`, per dtype one flat array of S and W of all tensors, to be added over shards, and
            ``finished`` likewise; ``totals``: ``step_size``, ``matrix_sums``, ``mu`` and ``u2``, one array per tensor.
    """

    def __init__(self, forms: Sequence[Canonical]) -> None:
        self.forms = tuple(forms)
        self.records: NDArray[Any] = np.zeros(len(self.forms), RECORD)
        ends = np.cumsum([form.slices for form in self.forms], dtype=np.int64)
        self._Q = np.zeros(int(ends[-1]) if len(ends) else 0)
        self.Q = np.split(self._Q, ends[:-1])
        self.sums: dict[str, NDArray[Any]] = {}
        self.finished: dict[str, NDArray[Any]] = {}
        self.totals: dict[str, list[NDArray[Any]]] = {}
        self._kept: list[NDArray[Any]] = []  # what records have addresses of
        record = self.records
        for name in ("outer", "rows", "inner", "columns", "slices"):
            record[name] = [getattr(form, name) for form in self.forms]
        record["global_rows"], record["global_columns"] = record["rows"], record["columns"]
        record["global_size"] = [form.size // form.slices if form.slices else 0 for form in self.forms]
        record["Q"] = self._Q.ctypes.data + 8 * (ends - record["slices"])
        record["flags"] = [FACTORED * form.factored + COLUMNS_FIRST * form.columns_first for form in self.forms]
        record["rng_stream"] = np.arange(len(self.forms))
        record["clip"], record["decay_factor"] = np.inf, 1.0

    def __len__(self) -> int:
        return len(self.forms)

    def bind(
        self,
        k: int,
        *,
        param: int,
        param_dtype: str,
        second_moment: dict[str, int],
        momentum: int = 0,
        momentum_dtype: str = "float32",
        residual: int = 0,
        grad: int = 0,
        grad_dtype: str | None = None,
    ) -> None:
        """Says where tensor ``k`` lives: addresses of dense memory that outlives the table's use.

        Args:
            second_moment: addresses of the statistics by the names of ``Layout.slots``, float32 (float64 for a
                float64 parameter), dense in the order that `canonical` was told.
            residual: of a bfloat16 or float16 parameter: bfloat16, in its order; what rounding has cut off.
        """
        record = self.records[k]
        row, column = self.forms[k].slots
        record["param"], record["grad"], record["momentum"], record["residual"] = param, grad, momentum, residual
        record["row"], record["column"] = second_moment[row], second_moment[column] if column else 0
        record["param_dtype"] = DTYPES[param_dtype]
        record["grad_dtype"] = DTYPES[grad_dtype or param_dtype]
        record["momentum_dtype"] = DTYPES[momentum_dtype]

    def configure(
        self,
        hp: Hyperparameters,
        where: slice | NDArray[Any] = slice(None),
        *,
        flags: int = 0,
        seed: int = 0,
    ) -> None:
        """Sets what a group says of the tensors ``where``, once.

        Args:
            flags: the sum of ``SCALE_AFTER_DECAY``, ``MAXIMIZE``, ``SKIP_NONFINITE`` and ``STOCHASTIC_ROUNDING``.
        """
        record = self.records[where]
        record["eps1"], record["eps2"] = hp.epsilon_1, hp.epsilon_2
        record["clip"] = np.inf if hp.clip_threshold is None else hp.clip_threshold
        record["beta1"] = hp.momentum or 0.0
        record["seed"] = seed
        record["flags"] &= np.uint64(FACTORED | COLUMNS_FIRST)
        record["flags"] |= np.uint64(SCALE_PARAMETER * hp.scale_parameter | flags)
        if not isinstance(where, slice):  # an index array gave a copy
            self.records[where] = record

    def begin(
        self,
        t: int | NDArray[Any],
        ema_weight: float | NDArray[Any],
        rho: float | NDArray[Any],
        decay_factor: float | NDArray[Any] = 1.0,
        q_known: bool | NDArray[Any] = False,
    ) -> None:
        """Sets the numbers of update ``t`` (from 1): each one for all tensors, or an array of one per tensor.

        Args:
            ema_weight: 1 - beta(t), ``hp.decay(t)`` (eq. 1).
            rho: ``hp.rho(...)`` (eq. 8).
            decay_factor: what x is multiplied by before the step: 1 - learning rate · weight decay.
            q_known: ``table.Q`` holds the sums of x² already, so measure need not read x.
        """
        record = self.records
        record["step"], record["ema_weight"], record["rho"], record["decay_factor"] = t, ema_weight, rho, decay_factor
        self.flag(Q_KNOWN, q_known)

    def flag(self, bit: int, on: bool | NDArray[Any]) -> None:
        """Sets one flag of every tensor, or takes it away."""
        flags = self.records["flags"]
        flags &= np.uint64(~bit & 0xFFFFFFFFFFFFFFFF)
        flags |= np.asarray(on, np.uint64) * np.uint64(bit)

    def number(self) -> NDArray[Any]:
        """The number of this update of every tensor, from 1: one more than stands at ``count``."""
        _library().number(self.records.ctypes.data, len(self.records))
        steps: NDArray[Any] = self.records["step"]
        return steps.astype(np.int64)

    def allocate_sums(self) -> None:
        """Gives measure, finish and apply their buffers; `step` needs none. S and W of a dtype are one array."""
        matrices = np.array([form.outer * form.inner if form.factored else 0 for form in self.forms], np.int64)
        slices = self.records["slices"]
        sizes = {"step_size": 2 * slices, "matrix_sums": 2 * matrices, "mu": matrices, "u2": slices}
        for name, size in sizes.items():
            ends = np.cumsum(size)
            flat = np.zeros(int(ends[-1]) if len(ends) else 0)
            self.totals[name] = np.split(flat, ends[:-1])
            self._kept.append(flat)
            self.records[name] = flat.ctypes.data + 8 * (ends - size)
        wide = self.records["param_dtype"] == DTYPES["float64"]
        for dtype, chosen in (("float32", ~wide), ("float64", wide)):
            where = np.flatnonzero(chosen)
            rows = np.array([self.forms[k].finished_size for k in where], np.int64)
            columns = np.array([self.forms[k].sums_size for k in where], np.int64)
            finished = self.finished[dtype] = np.zeros(int(rows.sum()), dtype)
            sums = self.sums[dtype] = np.zeros(2 * int(columns.sum()), dtype)
            width = finished.itemsize
            self.records["finished"][where] = finished.ctypes.data + width * (np.cumsum(rows) - rows)
            self.records["S"][where] = sums.ctypes.data + width * (np.cumsum(columns) - columns)
            self.records["W"][where] = sums.ctypes.data + width * (np.cumsum(columns) - columns + columns.sum())

    def run(
        self,
        verb: Verb,
        threads: int | None = None,
        isa: str | None = None,
        chosen: NDArray[np.int64] | None = None,
    ) -> None:
        """One call. Releases the interpreter lock.

        Args:
            threads: as for `threads`.
            isa: an instruction set instead of the one in use; for tests.
            chosen: some of the tensors instead of all.
        """
        records = self.records if chosen is None else self.records[chosen]
        code = _isa() if isa is None else ISAS.index(isa)
        error = _library().verbs[verb](records.ctypes.data, len(records), _threads(threads), code)
        if chosen is not None:
            self.records["skipped"][chosen] = records["skipped"]
        if error == 1:
            raise MemoryError("The native kernels found no memory for their row and column sums.")
        if error:
            raise RuntimeError(f"native {verb}: {_ERRORS.get(error, f'error {error}')}.")

    def measure(self, threads: int | None = None) -> None:
        """Fills the sums and commits nothing (eqs. 2, 4, 5, 6, 11). Needs `allocate_sums`, as the next two do."""
        self.run("measure", threads)

    def finish(self, threads: int | None = None) -> None:
        """Finishes the columns and the step sizes (eqs. 3, 7, 9, 10), and commits nothing. Spends the sums."""
        self.run("finish", threads)

    def apply(self, threads: int | None = None) -> None:
        """Commits the statistics and moves the parameters (eqs. 12, 13)."""
        self.run("apply", threads)

    def step(self, threads: int | None = None) -> None:
        """Measure, finish and apply, on one device."""
        self.run("step", threads)

    @property
    def skipped(self) -> NDArray[Any]:
        """Per tensor whether the last call left it alone because its gradient was not finite."""
        skipped: NDArray[Any] = self.records["skipped"] != 0
        return skipped


_isa, _threads = isa, threads  # `run` has arguments of these names
_ERRORS = {
    2: "a dtype code must be one of 0 to 3",
    3: "a tensor's param, grad, statistic, Q, sums or totals buffer is missing, or its slices do not divide its stack",
    4: "this machine or this build does not have that instruction set",
    5: "columns can come first only in a factored tensor without a stack inside, and only where columns are whole",
    6: "a residual belongs to a bfloat16 or float16 parameter that is rounded to nearest",
    7: "a target that is the gradient has the gradient's dtype",
}


def _library() -> _Library:
    library = _load()
    if isinstance(library, str):
        raise RuntimeError(library)
    return library


def path() -> Path | None:
    """The library file, whether it can be loaded or not; ``None`` where there is none."""
    return next((file for file in _candidates() if file.is_file()), None)


def _candidates() -> list[Path]:
    name = {"win32": "libadafactor.dll", "darwin": "libadafactor.dylib"}.get(sys.platform, "libadafactor.so")
    chosen = os.environ.get("ADAFACTOR_LIBRARY")
    import adafactor.core

    # An editable install keeps the sources in one place and what was built in another: both are on __path__.
    return [Path(chosen)] if chosen else [Path(folder) / name for folder in adafactor.core.__path__]


@cache
def _load() -> _Library | str:
    """The loaded library, or the reason why there is none."""
    file = path()
    if file is None:
        return (
            f"The native kernels are not built: there is no {' or '.join(map(str, _candidates()))}. "
            "Install a wheel, or install from source with a C++17 compiler and CMake."
        )
    try:
        library = ctypes.CDLL(str(file))
        abi = library.adafactor_abi
    except (OSError, AttributeError) as error:
        return f"The native kernels at {file} cannot be loaded: {error}."
    abi.restype = ctypes.c_int64
    if abi() != _ABI:
        return f"The native kernels at {file} belong to another version of this package. Reinstall it."
    verbs = {}
    for verb in ("measure", "finish", "apply", "step"):
        verbs[verb] = getattr(library, f"adafactor_{verb}")
        verbs[verb].argtypes = (ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64)
        verbs[verb].restype = ctypes.c_int
    number = library.adafactor_number
    number.argtypes, number.restype = (ctypes.c_void_p, ctypes.c_int64), None
    use_openmp = library.adafactor_use_openmp
    use_openmp.argtypes, use_openmp.restype = (ctypes.c_void_p, ctypes.c_void_p), None
    ask = ctypes.PyDLL(str(file)).adafactor_ask
    address, number_of = ctypes.c_void_p, ctypes.c_int64
    ask.argtypes = (address, number_of, address, number_of, number_of, address, address)
    library.adafactor_built.argtypes = library.adafactor_supported.argtypes = (ctypes.c_int64,)
    built = tuple(name for code, name in enumerate(ISAS) if library.adafactor_built(code))
    supported = tuple(name for code, name in enumerate(ISAS) if library.adafactor_supported(code))
    return _Library(str(file), verbs, number, use_openmp, ask, built, supported)
