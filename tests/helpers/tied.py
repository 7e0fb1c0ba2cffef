"""A small model with tied and frozen parameters, groups for its optimizer, and what must be the same after training."""

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


class Tied(nn.Module):
    """An embedding whose weight is the head's as well, two blocks that may be checkpointed, a frozen vector."""

    def __init__(self, reentrant: bool | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words = nn.Embedding(17, 12)
        self.blocks = nn.ModuleList(
            [nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 12), nn.LayerNorm(12)) for _ in range(2)]
        )
        self.head = nn.Linear(12, 17, bias=False)
        self.head.weight = self.words.weight
        self.scale = nn.Parameter(torch.ones(12), requires_grad=False)
        self.reentrant = reentrant

    def forward(self, tokens):
        x = self.words(tokens) * self.scale
        for block in self.blocks:
            x = x + (block(x) if self.reentrant is None else checkpoint(block, x, use_reentrant=self.reentrant))
        return self.head(x)


def loss_of(model, t):
    tokens = torch.randint(17, (4, 6), generator=torch.Generator().manual_seed(t))
    return nn.functional.cross_entropy(model(tokens).float().flatten(0, 1), tokens.roll(1, 1).flatten())


def groups(model):
    named = list(model.named_parameters())
    matrices, vectors = ([pair for pair in named if (pair[1].dim() > 1) == wide] for wide in (True, False))
    return [{"params": matrices, "beta1": 0.9, "weight_decay": 0.1}, {"params": vectors, "lr": 3e-2}]


def assert_same(a, model_a, b, model_b):
    for (name, p), q in zip(model_a.named_parameters(), model_b.parameters(), strict=True):
        assert torch.equal(p, q), name
        assert a.state[p].keys() == b.state[q].keys()
        for slot, value in a.state[p].items():
            assert torch.equal(value, b.state[q][slot]), (name, slot)
    assert a.skipped == b.skipped
