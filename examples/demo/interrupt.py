"""Ctrl-C as a request instead of an exception."""

from __future__ import annotations

import signal
import sys
from types import FrameType
from typing import Any


class Interrupt:
    """While active, the first Ctrl-C sets ``requested``; the second raises ``KeyboardInterrupt``.

    An exception in the middle of a step would leave the model without weights: Keras on JAX gives their memory
    away when a step begins and puts the new ones back when training ends.
    """

    def __init__(self) -> None:
        self.requested = False
        self._previous: Any = None

    def __enter__(self) -> Interrupt:
        self._previous = signal.signal(signal.SIGINT, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGINT, self._previous)

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        print("\nStopping after this step to report and save. Ctrl-C again quits at once.", file=sys.stderr, flush=True)
