"""The sets of parameter shapes that the benchmarks step over."""

from __future__ import annotations

import math

Shapes = list[tuple[int, ...]]

MATRIX: Shapes = [(4096, 4096)]


def transformer(width: int = 768, layers: int = 4, vocabulary: int = 8192) -> Shapes:
    """A decoder with the kernels, biases and norms of GPT-2, fewer layers and tokens."""
    layer: Shapes = [(width, 3 * width), (3 * width,), (width, width), (width,)]
    layer += [(width, 4 * width), (4 * width,), (4 * width, width), (width,)]
    layer += [(width,)] * 4
    return [(vocabulary, width), (1024, width), *layer * layers, (width,), (width,)]


#: The kernels and norms of one layer of Llama 7B.
LLAMA_LAYER: Shapes = [(4096, 4096)] * 4 + [(11008, 4096)] * 2 + [(4096, 11008)] + [(4096,)] * 2

#: GPT-2 small, 124 M parameters.
GPT2_SMALL: Shapes = transformer(768, 12, 50257)

#: What LoRA trains: a thousand thin matrices.
LORA: Shapes = [(16, 1024), (1024, 16)] * 500

MIXES: dict[str, Shapes] = {"4096x4096": MATRIX, "Transformer": transformer()}


def parameters(shapes: Shapes) -> int:
    return sum(math.prod(shape) for shape in shapes)
