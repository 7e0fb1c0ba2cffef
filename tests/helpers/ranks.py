"""Real processes for the sharded tests: one per rank, gloo, and a time limit, so that a hang is a failure.

``run(file, function, world)`` starts ``world`` processes that call ``function(rank, world, **arguments)`` of a file and
gives back what each returned (anything ``torch.save`` takes).
"""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist


def start(file: str, function: str, world: int, place: str, arguments: dict[str, Any]) -> list[subprocess.Popen[str]]:
    """The processes, started; their results go to ``place``."""
    torch.save(arguments, Path(place) / "arguments.pt")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ADAFACTOR_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}
    return [
        subprocess.Popen(
            [sys.executable, __file__, file, function, str(rank), str(world), place],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(world)
    ]


def finish(processes: list[subprocess.Popen[str]], limit: float) -> list[tuple[int | None, str]]:
    """Exit status (None: still running when the time was up, and killed) and output of every process."""
    end = time.monotonic() + limit
    found: list[tuple[int | None, str]] = []
    for process in processes:
        try:
            output, _ = process.communicate(timeout=max(0.1, end - time.monotonic()))
            found.append((process.returncode, output))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            found.append((None, process.communicate()[0]))
    return found


def run(file: str, function: str, world: int, limit: float = 90, **arguments: Any) -> list[Any]:
    """What every rank returned. AssertionError with the output where a rank failed or hung."""
    with TemporaryDirectory() as place:
        ended = finish(start(file, function, world, place, arguments), limit)
        for rank, (status, output) in enumerate(ended):
            told = "hung" if status is None else f"ended with {status}"
            assert status == 0, f"rank {rank} of {world} {told}:\n{output[-4000:]}"
        return [torch.load(Path(place) / f"{rank}.pt", weights_only=False) for rank in range(world)]


def main() -> None:
    file, function, rank, world, place = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), sys.argv[5]
    sys.path.insert(0, str(Path(file).parent))
    torch.set_num_threads(1)
    spec = importlib.util.spec_from_file_location("cases", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    dist.init_process_group("gloo", init_method=f"file://{place}/store", rank=rank, world_size=world)
    result = getattr(module, function)(rank, world, **torch.load(Path(place) / "arguments.pt", weights_only=False))
    torch.save(result, Path(place) / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
