"""A small model of blocks, shared by the tests of LISA and BAdam."""

import torch
from torch import nn

from eckart.optim import LowRankOptimizer

N, D, V = 6, 4, 11  # blocks, width, vocabulary


class Model(nn.Module):
    """Embedding, N residual blocks, norm, head."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(V, D, dtype=torch.float64)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(D, D, dtype=torch.float64), nn.Tanh()) for _ in range(N)
        )
        self.norm = nn.LayerNorm(D, dtype=torch.float64)
        self.head = nn.Linear(D, V, bias=False, dtype=torch.float64)

    def forward(self, ids):
        x = self.embed(ids)
        for layer in self.layers:
            x = x + layer(x)
        return self.head(self.norm(x))


def gradient(model, step):
    """Compute the gradients of a step's batch; returns its loss."""
    g = torch.Generator().manual_seed(step)
    ids, targets = torch.randint(V, (2, 5), generator=g), torch.randint(V, (10,), generator=g)
    loss = nn.functional.cross_entropy(model(ids).flatten(0, 1), targets)
    loss.backward()
    return loss.item()


def optimizer_of(model, method, lr=0.01, **kwargs):
    return LowRankOptimizer(model.named_parameters(), lr, rule=method.rule(), **kwargs)


def active(model):
    """The indices of the blocks that train."""
    return tuple(i for i, layer in enumerate(model.layers) if layer[0].weight.requires_grad)
