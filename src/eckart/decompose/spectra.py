"""Measures of how low the rank of a matrix is, from its singular values.

    stable rank     |W|_F^2 / |W|_2^2
    effective rank  exp(entropy of s / sum s)                    (Roy and Vetterli, 2007)
    energy at r     share of |W|_F^2 that the best rank-r approximation holds

The reference is a random matrix of the same shape, whose singular values follow the law of
Marchenko and Pastur (1967): a trained matrix is low-rank as far as it is below that.

s [*, k] are singular values, largest first; each of the leading dimensions has its own result.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

GRID = 20_001  # points of the density's numerical integral: 1e-3 in an effective rank


def stable_rank(s: Tensor) -> Tensor:
    """Stable rank [*], fp64; 0 for a matrix of zeros."""
    squares = s.double().square()
    return squares.sum(-1) / squares[..., 0].clamp_min(tiny())


def effective_rank(s: Tensor) -> Tensor:
    """Effective rank [*], fp64; 0 for a matrix of zeros."""
    s = s.double()
    total = s.sum(-1, keepdim=True)
    share = s / total.clamp_min(tiny())
    return torch.special.entr(share).sum(-1).exp() * (total.squeeze(-1) > 0)


def energy_at(s: Tensor, rank: int) -> Tensor:
    """Share of the energy held at a rank, [*] fp64 from 0 to 1; 1 for a matrix of zeros."""
    squares = s.double().square()
    total = squares.sum(-1)
    held = squares[..., :rank].sum(-1) / total.clamp_min(tiny())
    return torch.where(total > 0, held, torch.ones_like(held))


def tiny() -> float:
    return torch.finfo(torch.float64).tiny


@lru_cache
def random_spectrum(m: int, n: int) -> Tensor:
    """Expected singular values of an m x n matrix of independent entries, fp64 [min(m, n)].

    Quantiles of Marchenko and Pastur's law for entries of variance 1 / max(m, n): exact in the
    limit of large matrices, and within 2 % in effective rank from 32 rows on.
    """
    small, large = min(m, n), max(m, n)
    root = math.sqrt(small / large)
    low, high = 1 - root, 1 + root  # the range of the singular values
    x = torch.linspace(low, high, GRID, dtype=torch.float64)
    inside = (high**2 - x**2) * (x**2 - low**2)
    density = inside.clamp_min(0).sqrt() / x.clamp_min(1e-12)
    share = torch.cumsum(density, 0) / density.sum()
    wanted = 1 - (torch.arange(small, dtype=torch.float64) + 0.5) / small
    return x[torch.searchsorted(share, wanted).clamp_max(GRID - 1)]


def share_of_random(s: Tensor, m: int, n: int) -> Tensor:
    """Effective rank relative to that of a random m x n matrix, [*]: 1 for a random matrix, near
    0 for a low-rank one."""
    return effective_rank(s) / effective_rank(random_spectrum(m, n))
