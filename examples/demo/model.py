"""A decoder-only Transformer over bytes, from Keras's own layers and operations.

Nothing here is a class of ours, so a saved model loads wherever Keras and its optimizer do:

    import adafactor.keras, keras
    model = keras.saving.load_model("demo-output/adafactor.keras")
"""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
from keras import layers, ops

from adafactor.cli.demo.settings import Size

VOCABULARY = 256  # every byte


def build(size: Size, context: int) -> Any:
    """tokens (batch, context) -> logits (batch, context, 256) of the byte after each."""
    tokens = keras.Input((context,), dtype="int32", name="tokens")
    positions = ops.cumsum(ops.ones_like(tokens), axis=1) - 1
    h = layers.Embedding(VOCABULARY, size.width, name="embedding")(tokens)
    for i in range(size.layers):
        h = h + _attention(_norm(h, f"attention_{i}_norm"), positions, size.heads, f"attention_{i}")
        h = h + _mlp(_norm(h, f"mlp_{i}_norm"), f"mlp_{i}")
    logits = _dense(_norm(h, "final_norm"), VOCABULARY, "head")
    return keras.Model(tokens, logits, name="byte_transformer")


def _attention(h: Any, positions: Any, heads: int, name: str) -> Any:
    _, length, width = h.shape
    split = (-1, length, heads, width // heads)
    q, k, v = (ops.reshape(a, split) for a in ops.split(_dense(h, 3 * width, f"{name}_qkv"), 3, axis=-1))
    q, k = _rotate(q, positions), _rotate(k, positions)
    mixed = ops.dot_product_attention(q, k, v, is_causal=True)
    return _dense(ops.reshape(mixed, (-1, length, width)), width, f"{name}_out")


def _mlp(h: Any, name: str) -> Any:
    width = h.shape[-1]
    return _dense(_dense(h, 4 * width, f"{name}_in", "silu"), width, f"{name}_out")


def _rotate(a: Any, positions: Any) -> Any:
    """Rotary positions: turn each pair of channels by an angle that grows with the position. a: (b, t, heads, d)."""
    half = a.shape[-1] // 2
    frequencies = (10_000.0 ** (-np.arange(half) / half)).tolist()
    angles = ops.cast(positions, "float32")[:, :, None, None] * ops.reshape(frequencies, (1, 1, 1, half))
    cos, sin = ops.cos(angles), ops.sin(angles)
    left, right = ops.split(a, 2, axis=-1)
    return ops.concatenate([left * cos - right * sin, left * sin + right * cos], axis=-1)


def _norm(h: Any, name: str) -> Any:
    return layers.RMSNormalization(name=name)(h)


def _dense(h: Any, width: int, name: str, activation: str | None = None) -> Any:
    return layers.Dense(width, activation=activation, use_bias=False, name=name)(h)
