"""Terms that are a product of two thin matrices, which they compute from their tensors.

B [*, m, r], A [*, r, n]: a subclass defines `factors()`; everything else follows from it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from eckart.linear.lowrank import low_rank
from eckart.linear.sites import Site
from eckart.linear.term import Pair, Term


class Factored(Term):
    """y = B A x with (B, A) = factors(), the scale inside B; no m x n matrix is formed.

    The gradient reaches the tensors behind B through dL/dB = dy^T (A x), so a pass saves r numbers
    per token for them, and x only if A is trained.
    """

    def factors(self) -> tuple[Tensor, Tensor]:
        """B [*, m, r], A [*, r, n], differentiable in the trained tensors."""
        raise NotImplementedError

    def pair(self) -> Pair | None:
        if self.dropout and self.training:
            return None
        B, A = self.factors()
        return Pair(A, B)

    def forward(self, x: Tensor) -> Tensor:  # [*, t, n] -> [*, t, m]
        B, A = self.factors()
        return low_rank(self.dropped(x).to(A.dtype), A, B, mm=self.mm)

    def back(self, x: Tensor) -> Tensor:  # [*, t, m] -> [*, t, n]
        B, A = self.factors()
        return low_rank(x.to(A.dtype), B.mT, A.mT, mm=self.mm)

    def columns(self, ids: Tensor) -> Tensor:  # [..] -> [.., m]
        B, A = self.factors()
        return self.mm(F.embedding(ids, A.mT), B.mT)

    def dense(self) -> Tensor:  # [*, m, n]
        B, A = self.factors()
        return B @ A


def fresh_pair(
    site: Site, rank: int, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """B [*, m, r] = 0 and A [*, r, n] ~ U(-1/sqrt n, 1/sqrt n): LoRA's start, B A = 0.

    At an embedding A = 0 and B ~ N(0, 1): a lookup sees one column of A, and a random A
    would be sparse noise there.
    """
    (m, n), g = site.shape, generator or site.generator
    B, A = torch.zeros(*site.leading, m, rank), torch.zeros(*site.leading, rank, n)
    if site.kind == "embedding":
        return B.normal_(generator=g), A
    return B, A.uniform_(-1 / math.sqrt(n), 1 / math.sqrt(n), generator=g)
