"""Train a small Transformer on real text under FSDP2, with checkpoints that any number of ranks resumes.

    torchrun --nproc-per-node 2 examples/fsdp2_train.py
    torchrun --nproc-per-node 4 examples/fsdp2_train.py --steps 100     # goes on where the first one stopped

The text is Python's own standard library, as bytes. A checkpoint becomes visible under its name when it is whole,
so a job that is killed at any moment resumes from the last whole one.
"""

import argparse
import shutil
import sysconfig
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard

from adafactor.torch import Adafactor

LENGTH = 64


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)])
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # (batch, length, width)
        q, k, v = (h.unflatten(-1, (4, -1)).transpose(1, 2) for h in self.qkv(self.norms[0](x)).chunk(3, -1))
        attended = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.down(nn.functional.gelu(self.up(self.norms[1](x))))


class Transformer(nn.Module):
    def __init__(self, width: int = 64, layers: int = 2) -> None:
        super().__init__()
        self.bytes, self.places = nn.Embedding(256, width), nn.Embedding(LENGTH, width)
        self.blocks = nn.ModuleList([Block(width) for _ in range(layers)])
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 256)

    def forward(self, text: torch.Tensor) -> torch.Tensor:
        x = self.bytes(text) + self.places.weight
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def read_text(limit: int = 1 << 20) -> torch.Tensor:
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    text = b"".join(path.read_bytes() for path in files)[:limit]
    return torch.frombuffer(bytearray(text), dtype=torch.uint8).long()


def batch_of(text: torch.Tensor, step: int, rows: int) -> torch.Tensor:
    """The same batch for every number of ranks: this rank's share of its rows."""
    starts = torch.randint(len(text) - LENGTH - 1, (rows,), generator=torch.Generator().manual_seed(step))
    mine = starts.chunk(dist.get_world_size())[dist.get_rank()]
    return torch.stack([text[start : start + LENGTH + 1] for start in mine])


def whole_checkpoints(place: Path) -> list[Path]:
    return sorted(path for path in place.glob("step-*") if path.suffix != ".partial")


def save(place: Path, step: int, model: nn.Module, optimizer: Adafactor) -> None:
    """Write beside, then rename: a name without .partial stands for a whole checkpoint."""
    partial, done = place / f"step-{step:06}.partial", place / f"step-{step:06}"
    if dist.get_rank() == 0:
        shutil.rmtree(partial, ignore_errors=True)
    dist.barrier()
    weights, state = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optimizer": state}, checkpoint_id=partial)
    if dist.get_rank() == 0:
        partial.rename(done)
        for old in whole_checkpoints(place)[:-2]:
            shutil.rmtree(old)
    dist.barrier()


def load(path: Path, model: nn.Module, optimizer: Adafactor) -> int:
    weights, state = get_state_dict(model, optimizer)
    dcp.load({"model": weights, "optimizer": state}, checkpoint_id=path)
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=state)
    return int(path.name.removeprefix("step-"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=50, help="the last step")
    parser.add_argument("--every", type=int, default=10, help="steps between checkpoints")
    parser.add_argument("--rows", type=int, default=24, help="sequences in a batch, over all ranks")
    parser.add_argument("--lr", type=float, default=2e-2)
    parser.add_argument("--checkpoints", type=Path, default=Path("build/fsdp2"))
    arguments = parser.parse_args()

    dist.init_process_group("gloo")
    if arguments.rows % dist.get_world_size():
        parser.error(f"--rows must be a multiple of the ranks, {dist.get_world_size()}, got {arguments.rows}.")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = Transformer()
    for block in model.blocks:
        fully_shard(block)
    fully_shard(model)
    optimizer = Adafactor(model.parameters(), lr=arguments.lr)

    arguments.checkpoints.mkdir(parents=True, exist_ok=True)
    known = whole_checkpoints(arguments.checkpoints)
    first = load(known[-1], model, optimizer) if known else 0
    text = read_text()
    for step in range(first + 1, arguments.steps + 1):
        batch = batch_of(text, step, arguments.rows)
        loss = nn.functional.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        total = loss.detach().clone()
        dist.all_reduce(total)
        if dist.get_rank() == 0:
            print(f"step {step} of {arguments.steps}: loss {float(total) / dist.get_world_size():.6f}", flush=True)
        if step % arguments.every == 0 or step == arguments.steps:
            save(arguments.checkpoints, step, model, optimizer)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
