"""Small models of transformers that train in seconds, what they learn, and Trainer's arguments.

GPT-2's key biases have no gradient but rounding noise, which Adafactor scales up: two runs whose bits differ part
company. T5 has no biases.
"""

import torch
from transformers import GPT2Config, GPT2LMHeadModel, T5Config, T5ForConditionalGeneration, TrainingArguments


class Repeating(torch.utils.data.Dataset):
    """Sequences of eight tokens whose second half is the first."""

    def __init__(self, n=64):
        half = torch.randint(12, (n, 4), generator=torch.Generator().manual_seed(3))
        self.tokens = torch.cat([half, half], 1)

    def __len__(self):
        return len(self.tokens)

    def __getitem__(self, i):
        return {"input_ids": self.tokens[i], "labels": self.tokens[i]}


def small_gpt2():
    torch.manual_seed(4)
    sizes = {"vocab_size": 12, "n_positions": 8, "n_embd": 16, "n_layer": 2, "n_head": 2}
    return GPT2LMHeadModel(GPT2Config(**sizes, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0))


def small_t5():
    torch.manual_seed(4)
    sizes = {"vocab_size": 16, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
    tokens = {"decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 1}
    return T5ForConditionalGeneration(T5Config(**sizes, **tokens, dropout_rate=0.0))


def training_arguments(path, steps=10, **more):
    quiet = {"report_to": [], "disable_tqdm": True, "logging_strategy": "no", "save_strategy": "no"}
    return TrainingArguments(
        output_dir=str(path), max_steps=steps, use_cpu=True, seed=0, data_seed=0,
        **{**quiet, "per_device_train_batch_size": 4, "learning_rate": 1e-2, **more},
    )  # fmt: skip
