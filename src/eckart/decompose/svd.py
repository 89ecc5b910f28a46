"""Low-rank factorisations by SVD, always computed in fp32 or fp64.

Eckart and Young (1936): the truncated SVD is the best approximation of its rank in the
Frobenius norm, with squared error the sum of the squared singular values left out.
"""

from __future__ import annotations

import torch
from torch import Tensor


def working(M: Tensor) -> Tensor:
    """M in the dtype that factorisations are computed in: fp64 if it is fp64, else fp32."""
    return M if M.dtype == torch.float64 else M.float()


def fix_signs(U: Tensor, Vt: Tensor) -> tuple[Tensor, Tensor]:
    """Flip signs so that the largest entry of each left vector is positive (the first on ties):
    factors then do not depend on the solver's choice of sign.

    U [*, m, r], Vt [*, r, n].
    """
    largest = U.abs().argmax(dim=-2, keepdim=True)  # [*, 1, r]
    sign = torch.where(U.gather(-2, largest) < 0, -1.0, 1.0).to(U.dtype)
    return U * sign, Vt * sign.mT


def truncated_svd(M: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """U [*, m, r], s [*, r], Vt [*, r, n] with r = min(rank, m, n); deterministic signs."""
    U, s, Vt = torch.linalg.svd(working(M), full_matrices=False)
    U, Vt = fix_signs(U[..., :rank], Vt[..., :rank, :])
    return U, s[..., :rank], Vt


def balanced(U: Tensor, s: Tensor, Vt: Tensor) -> tuple[Tensor, Tensor]:
    """B [*, m, r], A [*, r, n] with B A = U diag(s) Vt and the square root of s on each side."""
    root = s.sqrt()
    return U * root.unsqueeze(-2), root.unsqueeze(-1) * Vt


def product_svd(B: Tensor, A: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U [*, m, k], s [*, k], Vt [*, k, n] of a product B A without forming it; k = min(R, m, n).

    B [*, m, R], A [*, R, n]: two thin QRs and one SVD of an R x R core, O((m + n) R^2).
    """
    Qb, Rb = torch.linalg.qr(working(B))
    Qa, Ra = torch.linalg.qr(working(A).mT)
    U, s, Vt = torch.linalg.svd(Rb @ Ra.mT, full_matrices=False)
    U, Vt = fix_signs(Qb @ U, Vt @ Qa.mT)
    return U, s, Vt


def recompress(B: Tensor, A: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """B, A of the best rank-r approximation of a product B A, and the product's singular values;
    the product is not formed."""
    U, s, Vt = product_svd(B, A)
    return *balanced(U[..., :rank], s[..., :rank], Vt[..., :rank, :]), s
