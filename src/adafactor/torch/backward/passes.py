"""Which backward pass a gradient is of: told by the graph tasks that autograd numbers.

A checkpoint with ``use_reentrant=True`` runs a graph task inside another. Tasks are counted, and a pass begins with a
task of its own: what directly follows a task and runs in a checkpoint belongs to the same pass.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
from torch.autograd import Variable
from torch.utils.checkpoint import CheckpointFunction


class Passes:
    """The backward pass that runs: its graph tasks that have not ended, and the latest of all tasks.

    Attributes:
        nested: whether the gradient that was followed last came from a reentrant checkpoint.
    """

    def __init__(self) -> None:
        self._open: set[int] = set()
        self._task = self._latest = -1
        self.nested = False

    def follow(self, end: Callable[[int], None]) -> bool:
        """Note that a gradient has come, and ask for a call of ``end`` with its graph task when that ends.

        Returns:
            Whether it is the first of a pass.
        """
        task = torch._C._current_graph_task_id()
        if task == self._task:
            return False
        self._task = task
        if task in self._open:  # back from a nested task
            self.nested = False
            return False
        self.nested = _in_checkpoint()
        # A second model of FSDP2 may reduce its last gradients after the task's end: the same pass still.
        begins = task > self._latest and not (self.nested and task == self._latest + 1)
        if begins:
            self._open.clear()
        self._latest = max(self._latest, task)
        if not self.nested:
            self._open.add(task)
        Variable._execution_engine.queue_callback(lambda: end(task))
        return begins

    def ended(self, task: int) -> bool:
        """Note the end of a graph task; whether the pass has ended with it."""
        self._task = -1
        outermost = task in self._open
        self._open.discard(task)
        return outermost


def _in_checkpoint() -> bool:
    """Whether a reentrant checkpoint is on the stack: this backward pass runs inside another."""
    frame = sys._getframe()
    while frame.f_back is not None:
        frame = frame.f_back
        if frame.f_code is CheckpointFunction.backward.__code__:
            return True
    return False
