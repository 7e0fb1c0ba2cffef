"""Ranks as threads of one process, whose collectives are sums and lists in its memory: for many small cases.

``run(world, function)`` gives what ``function(group)`` returned on every rank; ``group`` stands where a ProcessGroup
does, and counts the all-reduces and their bytes. One that fails ends the others' waiting.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist


class Meeting:
    """Where the ranks of one group wait for each other."""

    def __init__(self, world: int) -> None:
        self.barrier = threading.Barrier(world, timeout=60)
        self.given: list[Any] = [None] * world

    def exchange(self, rank: int, value: Any) -> list[Any]:
        """What everybody gave, in the order of ranks."""
        self.given[rank] = value
        self.barrier.wait()
        everything = list(self.given)
        self.barrier.wait()
        return everything


class Group:
    """One rank's group."""

    _device_types = (torch.device("cpu"),)

    def __init__(self, rank: int, world: int, meeting: Meeting) -> None:
        self._rank, self._world, self.meeting = rank, world, meeting
        self.reduced: list[int] = []

    def size(self) -> int:
        return self._world

    def rank(self) -> int:
        return self._rank

    def all_reduce(self, buffer: torch.Tensor) -> None:
        self.reduced.append(buffer.nbytes)
        buffer.copy_(torch.stack(self.meeting.exchange(self._rank, buffer.clone())).sum(0))

    def all_gather(self, found: list[torch.Tensor], buffer: torch.Tensor) -> None:
        for room, value in zip(found, self.meeting.exchange(self._rank, buffer.clone()), strict=True):
            room.copy_(value)

    def all_gather_object(self, found: list[Any], value: Any) -> None:
        found[:] = self.meeting.exchange(self._rank, value)


def run(world: int, function: Callable[[Group], Any]) -> list[Any]:
    meeting, results, errors = Meeting(world), [None] * world, list[BaseException]()

    def main(rank: int) -> None:
        torch.set_num_threads(1)
        try:
            results[rank] = function(Group(rank, world, meeting))
        except BaseException as error:
            errors.append(error)
            meeting.barrier.abort()

    patches = {
        "get_rank": lambda group: group.rank(),
        "get_process_group_ranks": lambda group: list(range(group.size())),
        "all_reduce": lambda buffer, group: group.all_reduce(buffer),
        "all_gather": lambda found, buffer, group: group.all_gather(found, buffer),
        "all_gather_object": lambda found, value, group: group.all_gather_object(found, value),
    }
    with mock.patch.multiple(dist, **patches):
        threads = [threading.Thread(target=main, args=(rank,)) for rank in range(world)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    if errors:
        raise next((error for error in errors if not isinstance(error, threading.BrokenBarrierError)), errors[0])
    return results
