"""Small models and trainings shared by the tests of optimizers."""

import torch
from torch import Tensor, nn


def gradients(shapes, steps, dtype=torch.float64, seed=0):
    """`steps` lists of random gradients with decaying spectra, one per shape."""
    g = torch.Generator().manual_seed(seed)
    out = []
    for _ in range(steps):
        row = []
        for shape in shapes:
            G = torch.randn(shape, generator=g, dtype=torch.float64)
            if G.dim() == 2:
                # distinct singular values: the subspace of a random matrix is well defined
                U, s, Vh = torch.linalg.svd(G, full_matrices=False)
                G = U * torch.logspace(0, -2, len(s), dtype=s.dtype) @ Vh
            row.append(G.to(dtype))
        out.append(row)
    return out


def parameters(shapes, dtype=torch.float64, seed=1):
    """Random parameters named w0, w1, ..."""
    g = torch.Generator().manual_seed(seed)
    return [
        (f"w{i}", nn.Parameter(torch.randn(s, generator=g, dtype=torch.float64).to(dtype)))
        for i, s in enumerate(shapes)
    ]


def run(optimizer, named, grads, scheduler=None) -> list[Tensor]:
    """Step with these gradients, one list per step; returns the detached parameters."""
    for row in grads:
        for (_, p), G in zip(named, row, strict=True):
            p.grad = None if G is None else G.clone()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
    return [p.detach().clone() for _, p in named]


def bits_equal(a: Tensor, b: Tensor) -> bool:
    """Equal in dtype, shape and every bit."""
    return a.dtype == b.dtype and torch.equal(a, b)
