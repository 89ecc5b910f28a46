"""LowRank: every map is a product of two thin ones from the start, and nothing else.

    y = B A x        B [m, r], A [r, n], both trained; there is no dense W

r (m + n) parameters and FLOPs where the dense map has m n: half at r = d / 4 in a square
map. Take it to pretrain a smaller, faster model; expect a higher loss than dense at equal
width, and a need for care at the start. Not for fine-tuning: the pretrained matrix is gone.

Source: M. Khodak et al., "Initialization and Regularization of Factorized Neural Layers",
2021. Spectral start: the truncated SVD of the matrix that was drawn for the dense map, its
singular values split evenly, so that B A is the best rank-r stand-in for the usual start.

m out, n in, r rank, * any leading dimensions (fused experts).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from annotated_types import Gt, Le
from torch import nn

from eckart.decompose import balanced, truncated_svd
from eckart.linear import LowRank as Factors
from eckart.linear import Site
from eckart.recipe import Cost, Paper, Weights


def rank_of(share: float, m: int, n: int) -> int:
    """The rank for a share of the smaller side, at least 1."""
    return max(1, round(share * min(m, n)))


@dataclass(frozen=True)
class LowRank(Weights):
    """Replaces each matrix by two thin factors and trains them from the start."""

    share: Annotated[float, Gt(0), Le(1)] = 0.25
    """Rank as a share of the smaller side of each map. Common: 0.25."""

    base: ClassVar = "dropped"
    rest: ClassVar = "trained"
    default_lr: ClassVar = 1e-3
    size: ClassVar = "share"
    paper: ClassVar = Paper(
        "Initialization and Regularization of Factorized Neural Layers",
        "https://arxiv.org/abs/2105.01029",
    )
    promises: ClassVar = ("merges", "exports_low_rank")

    def build_one(self, site: Site) -> Mapping[str, nn.Module]:
        rank = rank_of(self.share, *site.shape)
        B, A = balanced(*truncated_svd(site.weight(torch.float32), rank))
        return {"factors": Factors(B.contiguous(), A.contiguous())}

    def cost(self, m: int, n: int) -> Cost:
        r = rank_of(self.share, m, n)
        return Cost(parameters=r * (m + n), flops_per_token=2 * r * (m + n))
