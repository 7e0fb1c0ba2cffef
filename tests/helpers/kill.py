"""Kill one rank of examples/fsdp2_train.py with SIGKILL, in a run or in a checkpoint, and resume.

    python tests/helpers/kill.py --times 20

Every time the other rank must end by itself, and the restarted job must go on at the last whole checkpoint with the
losses, to the last printed digit, that it would have had.
"""

from __future__ import annotations

import argparse
import os
import re
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from tempfile import TemporaryDirectory

EXAMPLE = Path(__file__).parents[2] / "examples" / "fsdp2_train.py"
STEPS, EVERY = 9, 3


def port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def start(place: Path, world: int = 2, steps: int = STEPS) -> list[subprocess.Popen[str]]:
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port()), "WORLD_SIZE": str(world), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-u", str(EXAMPLE), "--steps", str(steps), "--every", str(EVERY), "--checkpoints", place]
    return [
        subprocess.Popen(
            command, env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )
        for rank in range(world)
    ]  # fmt: skip


def losses(output: str) -> dict[int, str]:
    return {int(step): loss for step, loss in re.findall(r"^step (\d+) of \d+: loss (\S+)$", output, re.M)}


def complete(place: Path, world: int = 2, steps: int = STEPS, limit: float = 90) -> dict[int, str]:
    """Run to the end; AssertionError where a rank fails or hangs."""
    processes = start(place, world, steps)
    outputs = []
    for process in processes:
        try:
            outputs.append(process.communicate(timeout=limit)[0])
        except subprocess.TimeoutExpired:
            for other in processes:
                other.kill()
            raise AssertionError(f"a rank hung:\n{process.communicate()[0][-3000:]}") from None
    assert all(process.returncode == 0 for process in processes), outputs[0][-3000:] + outputs[-1][-3000:]
    return losses(outputs[0])


def kill_one(place: Path, in_checkpoint: bool, victim: int, limit: float = 90) -> str:
    """Kill a rank once the moment has come; what rank 0 printed. AssertionError where another rank does not end."""
    processes = start(place)
    printed: list[list[str]] = [[] for _ in processes]

    def read(rank: int) -> None:
        stream = processes[rank].stdout
        assert stream is not None
        printed[rank].extend(stream) if rank else [printed[0].append(line) for line in stream]

    readers = [threading.Thread(target=read, args=(rank,)) for rank in range(len(processes))]
    for reader in readers:
        reader.start()
    end = time.monotonic() + limit
    while time.monotonic() < end:
        partial = any(place.glob(f"step-{2 * EVERY:06}.partial")) if place.exists() else False
        if partial if in_checkpoint else any(line.startswith(f"step {EVERY + 2} ") for line in printed[0]):
            break
        time.sleep(0.0005)
    processes[victim].kill()
    try:
        for rank, process in enumerate(processes):
            status = process.wait(timeout=max(1, end - time.monotonic()))
            assert status != 0, f"rank {rank} ended as if nothing had happened"
    except subprocess.TimeoutExpired:
        raise AssertionError(f"rank {rank} hung after rank {victim} was killed") from None
    finally:
        for process in processes:
            process.kill()
        for reader in readers:
            reader.join()
    return "".join(printed[0])


def attempt(reference: dict[int, str], in_checkpoint: bool, victim: int) -> int:
    """One kill and the restart; the step at which the restarted job went on."""
    with TemporaryDirectory() as name:
        place = Path(name) / "checkpoints"
        before = losses(kill_one(place, in_checkpoint, victim))
        whole = [int(path.name[5:]) for path in place.glob("step-*") if path.suffix != ".partial"]
        after = complete(place)
        first = max(whole, default=0) + 1
        assert sorted(after) == list(range(first, STEPS + 1)), f"resumed at {sorted(after)[:1]}, whole were {whole}"
        for found in (before, after):
            assert found == {step: reference[step] for step in found}
        return first


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=20)
    times = parser.parse_args().times
    with TemporaryDirectory() as name:
        reference = complete(Path(name) / "checkpoints")
    for in_checkpoint in (False, True):
        firsts = [attempt(reference, in_checkpoint, victim=k % 2) for k in range(times)]
        print(f"{'in a checkpoint' if in_checkpoint else 'in a run'}: {times} kills, resumed at {firsts}", flush=True)


if __name__ == "__main__":
    main()
