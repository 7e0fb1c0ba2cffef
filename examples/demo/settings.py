"""What the demo runs with: plain data, importable without Keras."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

BACKENDS = ("jax", "tensorflow", "torch")


@dataclass(frozen=True, slots=True)
class Size:
    """A Transformer's shape. The MLP is four times as wide as the model."""

    width: int
    layers: int
    heads: int


# Few and wide rather than many and narrow: an n x m matrix's state shrinks by the factor nm/(n + m).
SIZES = {
    "tiny": Size(width=64, layers=1, heads=2),
    "small": Size(width=512, layers=2, heads=8),
    "medium": Size(width=1024, layers=4, heads=16),
}

STEPS = 300
BATCH = 4  # windows per step: many cheap steps learn more in a minute than few good ones
CONTEXT = 128  # bytes per window
VALIDATION_WINDOWS = 128
RESUME_STEPS = 5
SAMPLE_BYTES = 320

Key = Literal["adamw", "keras-adafactor", "adafactor"]
KEYS: tuple[Key, ...] = ("adamw", "keras-adafactor", "adafactor")
LABELS: dict[Key, str] = {"adamw": "Keras AdamW", "keras-adafactor": "Keras Adafactor", "adafactor": "adafactor"}

#: Everything the demo writes into its output folder.
FILES = ("demo.json", "demo.png", *(f"{key}.keras" for key in KEYS))


@dataclass(frozen=True, slots=True)
class Settings:
    """One call of the demo, after its arguments have been checked."""

    size: str
    steps: int
    seed: int
    backend: str
    out: Path
