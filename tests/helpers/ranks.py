"""Real processes for the sharded tests: one per rank, gloo, and a time limit, so that a hang is a failure.

``run(file, function, world)`` has ``world`` processes call ``function(rank, world, **arguments)`` of a file and gives
back what each returned (anything ``torch.save`` takes). The processes of a world stay for the next call, because
starting them takes longer than most cases; they are forked from one, because each would import PyTorch for as long.
Where one fails or hangs, all of that world end. What a call leaves in the environment or in Accelerate's memory of its
process is gone with it, because files may come in any order.
"""

from __future__ import annotations

import atexit
import importlib
import importlib.util
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist

#: What every rank would import by itself.
IMPORTED = ("torch._dynamo", "torch.distributed.checkpoint.state_dict", "torch.distributed.fsdp",
            "torch.distributed.tensor.parallel", "adafactor.torch")  # fmt: skip


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
        pipes = [os.pipe() for _ in range(size)]
        read, self.write = zip(*pipes, strict=True)
        with self._log("forked").open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, __file__, str(self.folder), *map(str, read)],
                env=environment, pass_fds=read, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
                start_new_session=True,
            )  # fmt: skip
        for descriptor in read:
            os.close(descriptor)

    def _log(self, rank: object) -> Path:
        return self.folder / f"{rank}.log"

    def run(self, file: str, function: str, limit: float, arguments: dict[str, Any]) -> list[Any]:
        call = self.folder / str(self.calls)
        self.calls += 1
        call.mkdir()
        torch.save((file, function, arguments), call / "task.pt")
        for descriptor in self.write:
            os.write(descriptor, f"{call}\n".encode())
        results = [call / f"{rank}.pt" for rank in range(len(self.write))]
        end = time.monotonic() + limit
        while not all(result.exists() for result in results):
            ended = self.process.poll()
            if ended is not None or time.monotonic() > end:
                raise AssertionError(self._told(ended))
            time.sleep(0.01)
        return [torch.load(result, weights_only=False) for result in results]

    def _told(self, ended: int | None) -> str:
        """What the rank wrote that ended first, or all of them where they hang."""
        logs = [self._log("forked")] if ended is not None else map(self._log, range(len(self.write)))
        how = "ended" if ended is not None else "hung"
        return "\n".join(f"{log.stem} of {len(self.write)} {how}:\n{log.read_text()[-4000:]}" for log in logs)

    def close(self) -> None:
        for descriptor in self.write:  # who waits for a call ends by itself
            os.close(descriptor)
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(timeout=1)
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


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


def serve(rank: int, world: int, folder: Path, calls: int) -> None:
    """The life of one rank."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    for line in os.fdopen(calls):
        call = Path(line.strip())
        file, function, arguments = torch.load(call / "task.pt", weights_only=False)
        sys.path.insert(0, str(Path(file).parent))
        torch.set_num_threads(1)
        torch.manual_seed(0)
        called = getattr(load(file), function)
        with patch.dict(os.environ), accelerate_forgets():
            result = called(rank, world, **arguments)
        torch.save(result, call / f"{rank}.new")
        (call / f"{rank}.new").rename(call / f"{rank}.pt")
        sys.path.pop(0)


def main() -> None:
    """Fork the ranks; ends as soon as one of them fails, and prints what that one had written."""
    folder, calls = Path(sys.argv[1]), [int(descriptor) for descriptor in sys.argv[2:]]
    for module in IMPORTED:
        importlib.import_module(module)
    processes: dict[int, int] = {}
    for rank, mine in enumerate(calls):
        if (process := os.fork()) == 0:
            status = 1
            try:
                for other in calls:
                    if other != mine:
                        os.close(other)
                with (folder / f"{rank}.log").open("w") as log:
                    os.dup2(log.fileno(), 1)
                    os.dup2(log.fileno(), 2)
                serve(rank, len(calls), folder, mine)
                status = 0
            except BaseException:
                traceback.print_exc()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)  # at once: the other ranks may wait for this one
        processes[process] = rank
    while processes:
        ended, status = os.wait()
        rank = processes.pop(ended)
        if status:
            break
    else:
        return
    print(f"rank {rank} ended with {os.waitstatus_to_exitcode(status)}:\n{(folder / f'{rank}.log').read_text()}")


if __name__ == "__main__":
    main()
