"""Text from a trained model, byte by byte."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from adafactor.cli.demo.settings import CONTEXT


def generate(
    model: Any, prompt: bytes, count: int, seed: int, stop: Callable[[], bool], temperature: float = 0.6
) -> bytes:
    """Up to ``count`` bytes that ``model`` writes after ``prompt``; fewer if ``stop`` says so."""
    rng = np.random.default_rng(seed)
    written = bytearray(prompt)
    while len(written) < len(prompt) + count and not stop():
        seen = written[-CONTEXT:]
        # Attention is causal: what stands behind the last byte seen does not matter.
        tokens = np.zeros((1, CONTEXT), np.int32)
        tokens[0, : len(seen)] = seen
        logits = model.predict_on_batch(tokens)[0, len(seen) - 1].astype(np.float64) / temperature
        # Adding Gumbel noise and taking the largest draws from the softmax.
        written.append(int(np.argmax(logits + rng.gumbel(size=logits.shape))))
    return bytes(written[len(prompt) :])


def printable(data: bytes) -> str:
    """For a terminal: what is no text, and what would move the cursor, becomes a visible mark."""
    text = data.decode("utf-8", errors="replace")
    return "".join(c if c == "\n" or c.isprintable() else " " if c == "\t" else "�" for c in text)
