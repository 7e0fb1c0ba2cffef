"""Tiny models of other libraries, trained in four ways: python experiments/models.py

Each model is made from its configuration, with random weights, and trained 20 steps on random data: in float32 and in
bfloat16 with stochastic rounding, by ``step()`` and by gradient release. A cell holds the loss after over that before;
release must give the bits of ``step()``. Libraries that are missing are left out.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import traceback
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from adafactor.torch import Adafactor, step_in_backward

STEPS = 20
WORDS, LENGTH, WIDTH = 32, 8, 16


def _text(model: nn.Module) -> tuple[nn.Module, Callable[[], Tensor]]:
    tokens = torch.randint(2, WORDS, (4, LENGTH))
    return model, lambda: model(input_ids=tokens, labels=tokens).loss


def t5() -> Any:
    from transformers import T5Config, T5ForConditionalGeneration

    sizes = {"vocab_size": WORDS, "d_model": WIDTH, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
    return _text(T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0, dropout_rate=0.0)))


def bart() -> Any:
    from transformers import BartConfig, BartForConditionalGeneration

    sizes = {f"{part}_{what}": n for part in ("encoder", "decoder") for what, n in
             (("layers", 1), ("attention_heads", 2), ("ffn_dim", 32))}  # fmt: skip
    config = BartConfig(vocab_size=WORDS, d_model=WIDTH, max_position_embeddings=16, dropout=0.0, **sizes)
    return _text(BartForConditionalGeneration(config))


def gpt2() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"vocab_size": WORDS, "n_positions": 16, "n_embd": WIDTH, "n_layer": 2, "n_head": 2}
    return _text(GPT2LMHeadModel(GPT2Config(**sizes, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)))


def _decoder(name: str) -> Any:
    import transformers

    sizes = {
        **{"vocab_size": WORDS, "hidden_size": WIDTH, "intermediate_size": 32, "num_hidden_layers": 2},
        **{"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "pad_token_id": 0},
    }
    config = getattr(transformers, f"{name}Config")(**sizes)
    return getattr(transformers, f"{name}ForCausalLM")(config)


def llama() -> Any:
    return _text(_decoder("Llama"))


def gemma() -> Any:
    return _text(_decoder("Gemma"))


def qwen() -> Any:
    return _text(_decoder("Qwen3"))


def checkpointed() -> Any:
    """Activations computed again in the backward pass."""
    model = _decoder("Llama")
    model.gradient_checkpointing_enable()
    return _text(model)


def mixtral() -> Any:
    """Experts that some batches leave without a gradient."""
    return _text(_decoder("Mixtral"))


def vit() -> Any:
    from transformers import ViTConfig, ViTForImageClassification

    sizes = {"hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    model = ViTForImageClassification(ViTConfig(**sizes, image_size=16, patch_size=4, num_labels=4))
    images, labels = torch.randn(4, 3, 16, 16), torch.arange(4)
    return model, lambda: model(pixel_values=images.to(model.dtype), labels=labels).loss


def clip() -> Any:
    from transformers import CLIPConfig, CLIPModel

    sizes = {"hidden_size": WIDTH, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**sizes, "vocab_size": WORDS, "max_position_embeddings": 16, "eos_token_id": 1}
    vision = {**sizes, "image_size": 16, "patch_size": 4}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8))
    tokens, images = torch.randint(2, WORDS, (4, LENGTH)), torch.randn(4, 3, 16, 16)
    tokens[:, -1] = 1

    def loss() -> Tensor:
        out: Tensor = model(input_ids=tokens, pixel_values=images.to(model.dtype), return_loss=True).loss
        return out

    return model, loss


def whisper() -> Any:
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    sizes = {f"{part}_{what}": n for part in ("encoder", "decoder") for what, n in
             (("layers", 1), ("attention_heads", 2), ("ffn_dim", 32))}  # fmt: skip
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1, "decoder_start_token_id": 1}
    config = WhisperConfig(
        vocab_size=WORDS, d_model=WIDTH, num_mel_bins=8, max_source_positions=16, max_target_positions=16,
        dropout=0.0, **sizes, **tokens,
    )  # fmt: skip
    model = WhisperForConditionalGeneration(config)
    sound, labels = torch.randn(4, 8, 32), torch.randint(2, WORDS, (4, LENGTH))
    return model, lambda: model(input_features=sound.to(model.dtype), labels=labels).loss


def timm_vit() -> Any:
    return _timm("vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=2)


def timm_resnet() -> Any:
    return _timm("resnet10t")


def timm_convnext() -> Any:
    return _timm("convnext_atto", depths=(1, 1, 1, 1), dims=(8, 16, 24, 32))


def _timm(name: str, **sizes: Any) -> Any:
    import timm

    model = timm.create_model(name, num_classes=4, **sizes)
    images, labels = torch.randn(4, 3, 32, 32), torch.arange(4)
    return model, lambda: nn.functional.cross_entropy(model(images.to(next(model.parameters()).dtype)).float(), labels)


def unet() -> Any:
    from diffusers import UNet2DConditionModel

    model = UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4,
        cross_attention_dim=WIDTH, attention_head_dim=4, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    noisy, noise, words = torch.randn(4, 4, 8, 8), torch.randn(4, 4, 8, 8), torch.randn(4, 6, WIDTH)

    def loss() -> Tensor:
        found: Tensor = model(noisy.to(model.dtype), torch.arange(4), words.to(model.dtype)).sample
        return (found.float() - noise).square().mean()

    return model, loss


def dit() -> Any:
    from diffusers import DiTTransformer2DModel

    model = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=4, num_layers=2, sample_size=8,
        patch_size=2, num_embeds_ada_norm=10, norm_num_groups=4,
    )  # fmt: skip
    noisy, noise = torch.randn(4, 4, 8, 8), torch.randn(4, 4, 8, 8)

    def loss() -> Tensor:
        found: Tensor = model(noisy.to(model.dtype), torch.arange(4), class_labels=torch.arange(4)).sample
        return (found.float() - noise).square().mean()

    return model, loss


def lora() -> Any:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    return _text(get_peft_model(_decoder("Llama"), config))


MODELS = {
    "transformers": (t5, bart, gpt2, llama, checkpointed, gemma, qwen, mixtral, vit, clip, whisper),
    "timm": (timm_vit, timm_resnet, timm_convnext),
    "diffusers": (unet, dit),
    "peft": (lora,),
}


def train(make: Callable[[], Any], dtype: torch.dtype, release: bool, steps: int = STEPS) -> tuple[float, list[Tensor]]:
    """The loss after over the loss before, and the weights."""
    torch.manual_seed(0)
    model, loss_of = make()
    model.to(dtype).train()
    params = [param for param in model.parameters() if param.requires_grad]
    options = {"stochastic_rounding": True, "seed": 0} if dtype == torch.bfloat16 else {}
    optimizer = Adafactor(params, lr=3e-3, relative_step=False, scale_parameter=False, **options)
    released = step_in_backward(model, optimizer) if release else None
    losses = []
    for step in range(steps):
        torch.manual_seed(step)  # of dropout
        loss = loss_of()
        losses.append(loss.item())
        torch.autograd.backward(loss)
        if released is None:
            optimizer.step()
            optimizer.zero_grad()
    if optimizer.skipped or any(param.grad is not None for param in params):
        raise RuntimeError("a step was skipped, or a gradient is left")
    return losses[-1] / losses[0], [param.detach() for param in params]


def row(make: Callable[[], Any]) -> list[str]:
    """A model's four cells."""
    cells = []
    for dtype in (torch.float32, torch.bfloat16):
        weights: list[list[Tensor]] = []
        for release in (False, True):
            try:
                ratio, its = train(make, dtype, release)
                weights.append(its)
                cells.append(f"{ratio:.2f}")
            except Exception as error:
                traceback.print_exc()
                cells.append(f"{type(error).__name__}: {error}"[:60])
        if len(weights) == 2 and not all(map(torch.equal, *weights)):
            cells[-1] += " other bits"
    return cells


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="of these libraries", nargs="*", default=list(MODELS))
    arguments = parser.parse_args()
    print("| | float32 | released | bfloat16 | released |\n|---|---|---|---|---|")
    for library in arguments.only:
        try:
            version = importlib.metadata.version(library)
        except importlib.metadata.PackageNotFoundError:
            print(f"| {library}: not installed | | | | |")
            continue
        for make in MODELS[library]:
            print(f"| {library} {version} `{make.__name__}` | {' | '.join(row(make))} |", flush=True)


if __name__ == "__main__":
    main()
