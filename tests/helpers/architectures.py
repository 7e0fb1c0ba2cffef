"""Parameter shapes of public models, name by name, and a safetensors file of headers only.

Each function's docstring says where the shapes are published; the tests compare their totals with the published
counts, and those of the transformers library's own models with them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path

Shapes = dict[str, tuple[int, ...]]


def llama_7b(hidden: int = 4096, inner: int = 11008, layers: int = 32, vocabulary: int = 32000) -> Shapes:
    """Llama 2 7B as its Hugging Face checkpoint names it; 6,738,415,616 parameters."""
    shapes: Shapes = {"model.embed_tokens.weight": (vocabulary, hidden)}
    for layer in range(layers):
        at = f"model.layers.{layer}"
        shapes |= {f"{at}.self_attn.{name}_proj.weight": (hidden, hidden) for name in "qkvo"}
        shapes |= {f"{at}.mlp.{name}_proj.weight": (inner, hidden) for name in ("gate", "up")}
        shapes[f"{at}.mlp.down_proj.weight"] = (hidden, inner)
        shapes |= {f"{at}.{name}_layernorm.weight": (hidden,) for name in ("input", "post_attention")}
    return shapes | {"model.norm.weight": (hidden,), "lm_head.weight": (vocabulary, hidden)}


def gemma_2b(
    hidden: int = 2048, inner: int = 16384, layers: int = 18, vocabulary: int = 256000, head: int = 256, heads: int = 8
) -> Shapes:
    """Gemma 2B, one key and value head, embeddings tied; 2,506,172,416 parameters."""
    shapes: Shapes = {"model.embed_tokens.weight": (vocabulary, hidden)}
    for layer in range(layers):
        at = f"model.layers.{layer}"
        shapes[f"{at}.self_attn.q_proj.weight"] = (heads * head, hidden)
        shapes |= {f"{at}.self_attn.{name}_proj.weight": (head, hidden) for name in "kv"}
        shapes[f"{at}.self_attn.o_proj.weight"] = (hidden, heads * head)
        shapes |= {f"{at}.mlp.{name}_proj.weight": (inner, hidden) for name in ("gate", "up")}
        shapes[f"{at}.mlp.down_proj.weight"] = (hidden, inner)
        shapes |= {f"{at}.{name}_layernorm.weight": (hidden,) for name in ("input", "post_attention")}
    return shapes | {"model.norm.weight": (hidden,)}


def t5(hidden: int = 512, inner: int = 2048, layers: int = 6, heads: int = 8, vocabulary: int = 32128) -> Shapes:
    """T5 (small by default: 60,506,624 parameters), embeddings tied."""
    shapes: Shapes = {"shared.weight": (vocabulary, hidden)}
    for stack, sublayers in (("encoder", ("SelfAttention",)), ("decoder", ("SelfAttention", "EncDecAttention"))):
        for layer in range(layers):
            for number, name in enumerate(sublayers):
                at = f"{stack}.block.{layer}.layer.{number}"
                shapes |= {f"{at}.{name}.{kernel}.weight": (64 * heads, hidden) for kernel in "qkv"}
                shapes[f"{at}.{name}.o.weight"] = (hidden, 64 * heads)
                if layer == 0 and name == "SelfAttention":
                    shapes[f"{at}.{name}.relative_attention_bias.weight"] = (32, heads)
                shapes[f"{at}.layer_norm.weight"] = (hidden,)
            at = f"{stack}.block.{layer}.layer.{len(sublayers)}"
            shapes |= {
                f"{at}.DenseReluDense.wi.weight": (inner, hidden),
                f"{at}.DenseReluDense.wo.weight": (hidden, inner),
                f"{at}.layer_norm.weight": (hidden,),
            }
        shapes[f"{stack}.final_layer_norm.weight"] = (hidden,)
    return shapes


def vit(hidden: int = 768, inner: int = 3072, layers: int = 12, classes: int = 1000, patch: int = 16) -> Shapes:
    """ViT-B/16 at 224 pixels with a head of 1,000 classes; 86,567,656 parameters."""
    shapes: Shapes = {
        "cls_token": (1, 1, hidden),
        "position_embeddings": (1, 1 + (224 // patch) ** 2, hidden),
        "patch.weight": (hidden, 3, patch, patch),
        "patch.bias": (hidden,),
    }
    for layer in range(layers):
        for name in ("query", "key", "value", "output"):
            shapes |= {f"{layer}.{name}.weight": (hidden, hidden), f"{layer}.{name}.bias": (hidden,)}
        shapes |= {f"{layer}.up.weight": (inner, hidden), f"{layer}.up.bias": (inner,)}
        shapes |= {f"{layer}.down.weight": (hidden, inner), f"{layer}.down.bias": (hidden,)}
        shapes |= {f"{layer}.norm{k}.{name}": (hidden,) for k in (1, 2) for name in ("weight", "bias")}
    shapes |= {"norm.weight": (hidden,), "norm.bias": (hidden,)}
    return shapes | {"head.weight": (classes, hidden), "head.bias": (classes,)}


def stable_diffusion_unet(widths: tuple[int, ...] = (320, 640, 1280, 1280), context: int = 768) -> Shapes:
    """The U-Net of Stable Diffusion 1.x; 859,520,964 parameters.

    Four levels of the given widths. Going down, a level has two residual blocks, each followed by a Transformer block
    except on the last level, and a 3 x 3 convolution of stride 2 except there. In the middle: residual, Transformer,
    residual. Going up, a level has three residual blocks, whose input is joined by that of the way down, with
    Transformer blocks except on the first (lowest) level, and a 3 x 3 convolution except on the last.
    """
    shapes: Shapes = {}

    def dense(name: str, into: int, out: int, bias: bool = True) -> None:
        shapes[f"{name}.weight"] = (out, into)
        if bias:
            shapes[f"{name}.bias"] = (out,)

    def convolution(name: str, into: int, out: int, size: int = 3) -> None:
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (out, into, size, size), (out,)

    def norm(name: str, width: int) -> None:
        shapes[f"{name}.weight"] = shapes[f"{name}.bias"] = (width,)

    time = 4 * widths[0]

    def residual(name: str, into: int, out: int) -> None:
        norm(f"{name}.norm1", into)
        convolution(f"{name}.conv1", into, out)
        dense(f"{name}.time_emb_proj", time, out)
        norm(f"{name}.norm2", out)
        convolution(f"{name}.conv2", out, out)
        if into != out:
            convolution(f"{name}.conv_shortcut", into, out, 1)

    def transformer(name: str, width: int) -> None:
        norm(f"{name}.norm", width)
        convolution(f"{name}.proj_in", width, width, 1)
        block = f"{name}.transformer_blocks.0"
        for attention, source in (("attn1", width), ("attn2", context)):
            dense(f"{block}.{attention}.to_q", width, width, bias=False)
            dense(f"{block}.{attention}.to_k", source, width, bias=False)
            dense(f"{block}.{attention}.to_v", source, width, bias=False)
            dense(f"{block}.{attention}.to_out.0", width, width)
        dense(f"{block}.ff.net.0.proj", width, 8 * width)  # GEGLU: twice four times the width
        dense(f"{block}.ff.net.2", 4 * width, width)
        for number in (1, 2, 3):
            norm(f"{block}.norm{number}", width)
        convolution(f"{name}.proj_out", width, width, 1)

    convolution("conv_in", 4, widths[0])
    dense("time_embedding.linear_1", widths[0], time)
    dense("time_embedding.linear_2", time, time)
    skips, into, last = [widths[0]], widths[0], len(widths) - 1
    for level, width in enumerate(widths):
        for number in range(2):
            residual(f"down_blocks.{level}.resnets.{number}", into, width)
            if level != last:
                transformer(f"down_blocks.{level}.attentions.{number}", width)
            into = width
            skips.append(width)
        if level != last:
            convolution(f"down_blocks.{level}.downsamplers.0.conv", width, width)
            skips.append(width)
    residual("mid_block.resnets.0", into, into)
    transformer("mid_block.attentions.0", into)
    residual("mid_block.resnets.1", into, into)
    for level, width in enumerate(reversed(widths)):
        for number in range(3):
            residual(f"up_blocks.{level}.resnets.{number}", into + skips.pop(), width)
            if level:
                transformer(f"up_blocks.{level}.attentions.{number}", width)
            into = width
        if level != last:
            convolution(f"up_blocks.{level}.upsamplers.0.conv", width, width)
    norm("conv_norm_out", widths[0])
    convolution("conv_out", widths[0], 4)
    return shapes


#: At their public sizes, with the published number of parameters.
PUBLIC: dict[str, tuple[Shapes, int]] = {
    "Llama 2 7B": (llama_7b(), 6_738_415_616),
    "Gemma 2B": (gemma_2b(), 2_506_172_416),
    "T5 small": (t5(), 60_506_624),
    "ViT-B/16": (vit(), 86_567_656),
    "Stable Diffusion 1.x U-Net": (stable_diffusion_unet(), 859_520_964),
}

#: The same, small enough to allocate.
SMALL: dict[str, Shapes] = {
    "Llama": llama_7b(64, 172, 2, 500),
    "Gemma": gemma_2b(48, 96, 2, 400, 16, 4),
    "T5": t5(32, 64, 2, 2, 200),
    "ViT": vit(48, 96, 2, 10),
    "U-Net": stable_diffusion_unet((32, 64, 64), 24),
}


def write_header(file: Path, shapes: Mapping[str, tuple[int, ...]], dtype: str = "BF16") -> Path:
    """A safetensors file of these shapes whose weights are a hole in the file: valid, and a few kB on disk."""
    itemsize = {"BF16": 2, "F16": 2, "F32": 4}[dtype]
    header, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + itemsize * math.prod(shape)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with file.open("wb") as opened:
        opened.write(len(text).to_bytes(8, "little") + text)
        opened.truncate(8 + len(text) + end)
    return file
