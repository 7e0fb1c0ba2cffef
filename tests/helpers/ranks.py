"""Real processes for the sharded tests: one per rank, gloo, and a time limit, so that a hang is a failure.

``run(file, function, world)`` has ``world`` processes call ``function(rank, world, **arguments)`` of a file and gives
back what each returned (anything ``torch.save`` takes). The processes of a world stay for the next call, because
starting them takes longer than most cases; where one fails or hangs, all of that world end. What a call leaves in the
environment or in Accelerate's memory of its process is gone with it, because files may come in any order.
"""

from __future__ import annotations

import atexit
import importlib.util
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist


class World:
    """The processes of one world; they end with this one, because then there is nothing more to read."""

    def __init__(self, size: int) -> None:
        self.place = TemporaryDirectory()
        self.folder = Path(self.place.name)
        self.calls = 0
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "ADAFACTOR_NUM_THREADS": "1",
            "TORCH_CPP_LOG_LEVEL": "ERROR",
        }
        self.logs = [(self.folder / f"{rank}.log").open("w+") for rank in range(size)]
        self.processes = [
            subprocess.Popen(
                [sys.executable, __file__, str(rank), str(size), str(self.folder)],
                env=environment, stdin=subprocess.PIPE, stdout=log, stderr=subprocess.STDOUT, text=True,
            )
            for rank, log in enumerate(self.logs)
        ]  # fmt: skip

    def run(self, file: str, function: str, limit: float, arguments: dict[str, Any]) -> list[Any]:
        call = self.folder / str(self.calls)
        self.calls += 1
        call.mkdir()
        torch.save((file, function, arguments), call / "task.pt")
        for process in self.processes:
            assert process.stdin is not None
            print(call, file=process.stdin, flush=True)
        results = [call / f"{rank}.pt" for rank in range(len(self.processes))]
        end = time.monotonic() + limit
        while not all(result.exists() for result in results):
            ended = [process.poll() for process in self.processes]
            if any(status is not None for status in ended) or time.monotonic() > end:
                self.close()
                raise AssertionError(self._told(ended))
            time.sleep(0.01)
        return [torch.load(result, weights_only=False) for result in results]

    def _told(self, ended: list[int | None]) -> str:
        """What the ranks wrote: those that failed, or all of them if none did."""
        failed = [rank for rank, status in enumerate(ended) if status is not None]
        told = []
        for rank in failed or range(len(ended)):
            self.logs[rank].seek(0)
            how = f"ended with {ended[rank]}" if failed else "hung"
            told.append(f"rank {rank} of {len(ended)} {how}:\n{self.logs[rank].read()[-4000:]}")
        return "\n".join(told)

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()


_worlds: dict[int, World] = {}


def run(file: str, function: str, world: int, limit: float = 300, **arguments: Any) -> list[Any]:
    """What every rank returned. AssertionError with the output where a rank failed or hung."""
    if world not in _worlds:
        _worlds[world] = World(world)
    try:
        return _worlds[world].run(file, function, limit, arguments)
    except BaseException:
        end(world)
        raise


@atexit.register
def end(*sizes: int) -> None:
    """End the processes of the named worlds, of all by default."""
    for size in sizes or list(_worlds):
        if size in _worlds:
            _worlds.pop(size).close()


@cache
def load(file: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(Path(file).stem, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@contextmanager
def accelerate_forgets() -> Iterator[None]:
    yield
    if "accelerate" in sys.modules:
        from accelerate.state import AcceleratorState, GradientState

        AcceleratorState._reset_state(True)
        GradientState._reset_state()


def main() -> None:
    rank, world, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    for line in sys.stdin:
        call = Path(line.strip())
        file, function, arguments = torch.load(call / "task.pt", weights_only=False)
        sys.path.insert(0, str(Path(file).parent))
        torch.set_num_threads(1)
        torch.manual_seed(0)
        try:
            called = getattr(load(file), function)
            with patch.dict(os.environ), accelerate_forgets():
                result = called(rank, world, **arguments)
        except BaseException:
            traceback.print_exc()
            sys.stdout.flush()
            os._exit(1)  # at once: the other ranks may wait for this one
        torch.save(result, call / f"{rank}.new")
        (call / f"{rank}.new").rename(call / f"{rank}.pt")
        sys.path.pop(0)


if __name__ == "__main__":
    main()
