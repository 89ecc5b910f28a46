"""Power iteration, warm-started from the last step (Dion, Ahn et al. 2025)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from eckart.decompose.products import product
from eckart.optim.inner import unit_rows
from eckart.optim.project import Basis, Enough, Found, Search, Subspace, gaussian, polish


@dataclass(frozen=True)
class Warm(Subspace):
    """Projects A from the left on P = orth(A Q^T) [m, r]; then Q [r, n] becomes P^T A with rows
    scaled to length 1.

    Only Q is stored; P is used for one step. The first Q is random.
    """

    names: ClassVar[tuple[str, ...]] = ("warm",)
    derived: ClassVar[bool] = True
    fleeting: ClassVar[bool] = True

    def ranks(self, m: int, n: int) -> tuple[int, int]:
        return max(super().ranks(m, n)), 0

    def init(self, W: Tensor) -> Found:
        *lead, m, n = W.shape
        eye = torch.eye(self.ranks(m, n)[0], n, dtype=W.dtype, device=W.device)
        return {"warm": eye.expand(*lead, *eye.shape).clone()}

    def basis(self, state: Mapping[str, Tensor], like: Tensor, size: tuple[int, int]) -> Basis:
        """The first r coordinates: used where A is zero, so that no P can be computed."""
        *lead, r, _ = state["warm"].shape
        eye = torch.eye(size[0], r, dtype=like.dtype, device=like.device)
        return Basis(eye.expand(*lead, *eye.shape), None)

    def find(self, search: Search) -> Found:
        A, rows = search.G, search.rows  # [k, *, m, n]
        Q = search.old["warm"].to(A.dtype)  # [k, *, r, n]
        if search.first:
            Z = torch.stack([gaussian(Q.shape[-2], Q.shape[-1], seed) for seed in search.seeds])
            Q = Z.to(A.device, A.dtype).view(-1, *(1,) * (Q.dim() - 3), *Q.shape[-2:])
        P = polish(torch.linalg.qr(rows.whole(product(A, Q.mT)))[0])
        R = rows.total(product(rows.part(P).mT, A))
        return {"warm": unit_rows(R), "left": P, "low": R}

    def from_shards(self, first: bool, size: tuple[int, int]) -> Enough:
        return "rows"
