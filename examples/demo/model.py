"""A decoder-only Transformer over bytes, from Keras's own layers and operations, and the three optimizers.

Nothing here is a class of ours, so a saved model loads wherever Keras and its optimizer do:

    import adafactor.keras, keras
    model = keras.saving.load_model("demo-output/adafactor.keras")
"""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
from keras import layers, ops

from adafactor.keras import Adafactor

LABELS = {"adamw": "Keras AdamW", "keras-adafactor": "Keras Adafactor", "adafactor": "adafactor"}


def optimizer(key: str, steps: int) -> Any:
    """A new optimizer, a key of ``LABELS``, for a run of ``steps`` steps.

    The peak learning rates of the two Adafactors are relative: multiplied by each variable's root mean square.
    """
    match key:
        case "adamw":
            return keras.optimizers.AdamW(schedule(1e-3, steps), weight_decay=0.01)
        case "keras-adafactor":
            return keras.optimizers.Adafactor(schedule(2e-2, steps))
        case _:  # Keras caps every learning rate at 1/sqrt(t), schedules too. To compare like with like, so do we.
            return Adafactor(schedule(2e-2, steps), relative_step="always")


def schedule(peak: float, steps: int) -> Any:
    """A tenth of the steps to warm up, then a cosine down to a tenth: never 0, so that a resumed run has work to do."""
    warmup = steps // 10
    start = {"warmup_target": peak, "warmup_steps": warmup} if warmup else {}
    return keras.optimizers.schedules.CosineDecay(peak / 10 if warmup else peak, steps - warmup, alpha=0.1, **start)


def build(width: int, depth: int, heads: int, context: int) -> Any:
    """tokens (batch, context) -> logits (batch, context, 256) of the byte after each."""
    tokens = keras.Input((context,), dtype="int32", name="tokens")
    positions = ops.cumsum(ops.ones_like(tokens), axis=1) - 1
    h = layers.Embedding(256, width, name="embedding")(tokens)
    for i in range(depth):
        h = h + attention(norm(h, f"attention_{i}_norm"), positions, heads, f"attention_{i}")
        inner = dense(norm(h, f"mlp_{i}_norm"), 4 * width, f"mlp_{i}_in", "silu")
        h = h + dense(inner, width, f"mlp_{i}_out")
    return keras.Model(tokens, dense(norm(h, "final_norm"), 256, "head"), name="byte_transformer")


def attention(h: Any, positions: Any, heads: int, name: str) -> Any:
    _, length, width = h.shape
    split = (-1, length, heads, width // heads)
    q, k, v = (ops.reshape(a, split) for a in ops.split(dense(h, 3 * width, f"{name}_qkv"), 3, axis=-1))
    mixed = ops.dot_product_attention(rotate(q, positions), rotate(k, positions), v, is_causal=True)
    return dense(ops.reshape(mixed, (-1, length, width)), width, f"{name}_out")


def rotate(a: Any, positions: Any) -> Any:
    """Rotary positions: turn each pair of channels by an angle that grows with the position. a: (b, t, heads, d)."""
    half = a.shape[-1] // 2
    frequencies = (10_000.0 ** (-np.arange(half) / half)).tolist()
    angles = ops.cast(positions, "float32")[:, :, None, None] * ops.reshape(frequencies, (1, 1, 1, half))
    cos, sin = ops.cos(angles), ops.sin(angles)
    left, right = ops.split(a, 2, axis=-1)
    return ops.concatenate([left * cos - right * sin, left * sin + right * cos], axis=-1)


def norm(h: Any, name: str) -> Any:
    return layers.RMSNormalization(name=name)(h)


def dense(h: Any, width: int, name: str, activation: str | None = None) -> Any:
    return layers.Dense(width, activation=activation, use_bias=False, name=name)(h)
