"""How near the learning-rate test comes to an exhaustive search: python experiments/lr_range.py

Three small models, five seeds each. The search trains every learning rate of the grid for ten times as many steps and
takes the one with the least held-out loss; the test has a few steps with each. The distance is in steps of the grid.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from adafactor.torch import Adafactor, lr_range_test
from adafactor.torch.lr_range import GRID

Make = Callable[[], tuple[nn.Module, Callable[[], Iterator[Any]], Callable[[nn.Module, Any], Tensor]]]


def classifier() -> Any:
    """A multilayer perceptron that learns another one's classes."""
    teacher = nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 8))
    model = nn.Sequential(nn.Linear(32, 128), nn.GELU(), nn.Linear(128, 128), nn.GELU(), nn.Linear(128, 8))

    def batches() -> Iterator[Any]:
        while True:
            x = torch.randn(64, 32)
            yield x, teacher(x).argmax(1)

    return model, batches, lambda model, batch: cross_entropy(model(batch[0]), batch[1])


class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            *(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU()),
            *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 4)),
        )

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layers(x)
        return out


def images() -> Any:
    """A small convolutional network that tells four textures apart, under noise."""
    textures = torch.randn(4, 1, 12, 12)

    def batches() -> Iterator[Any]:
        while True:
            y = torch.randint(4, (32,))
            shifts = torch.randint(12, (2,)).tolist()
            yield textures[y].roll(shifts, (2, 3)) + 0.7 * torch.randn(32, 1, 12, 12), y

    return Convolutions(), batches, lambda model, batch: cross_entropy(model(batch[0]), batch[1])


class Transformer(nn.Module):
    def __init__(self, words: int = 16, width: int = 32, length: int = 12) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(words, width), nn.Parameter(torch.randn(length, width) * 0.02)
        layer = nn.TransformerEncoderLayer(width, 2, 64, dropout=0.0, batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(width, words)
        self.mask = nn.Transformer.generate_square_subsequent_mask(length)

    def forward(self, tokens: Tensor) -> Tensor:
        out: Tensor = self.head(self.blocks(self.words(tokens) + self.places, mask=self.mask, is_causal=True))
        return out


def language() -> Any:
    """A Transformer that learns sentences whose second half repeats the first."""

    def batches() -> Iterator[Any]:
        while True:
            half = torch.randint(16, (32, 6))
            yield torch.cat([half, half], 1)

    def loss_of(model: nn.Module, tokens: Tensor) -> Tensor:
        return cross_entropy(model(tokens)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())

    return Transformer(), batches, loss_of


MODELS: dict[str, Callable[[], Any]] = {"classifier": classifier, "images": images, "language": language}


def best(make: Callable[[], Any], seed: int, steps: int) -> tuple[int, list[float]]:
    """The exhaustive search's: its place in the grid, and the losses."""
    losses = []
    for lr in GRID:
        torch.manual_seed(seed)
        model, batches, loss_of = make()
        optimizer = Adafactor(model.parameters(), lr=lr, relative_step=False)
        source = batches()
        held = [next(source) for _ in range(16)]
        for _ in range(steps):
            optimizer.zero_grad()
            loss_of(model, next(source)).backward()
            optimizer.step()
        with torch.no_grad():
            losses.append(sum(loss_of(model, batch).item() for batch in held) / len(held))
    return min(range(len(GRID)), key=losses.__getitem__), losses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for name, make in MODELS.items():
        for seed in range(arguments.seeds):
            torch.manual_seed(seed)
            model, batches, loss_of = make()
            optimizer = Adafactor(model.parameters(), lr=1e-2, relative_step=False)
            found = lr_range_test(model, optimizer, batches(), loss_of, steps=arguments.steps)
            place, losses = best(make, seed, 10 * arguments.steps)
            distance = None if found.lr is None else found.lrs.index(found.lr) - place
            rows.append({"model": name, "seed": seed, "found": found.lr, "best": GRID[place], "distance": distance})
            print(
                f"{name:12} seed {seed}: test {found.lr or 0:8.3g}  search {GRID[place]:8.3g}  {distance}", flush=True
            )
            print("   test  ", [f"{x:.3f}" for x in found.losses], f"noise {found.noise:.3f}")
            print("   search", [f"{x:.3f}" for x in losses])
    near = sum(row["distance"] is not None and abs(row["distance"]) <= 1 for row in rows)
    print(f"{near} of {len(rows)} within one step of the grid")
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
