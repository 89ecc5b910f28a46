"""Orthogonalisation as an inner rule (Muon): Newton-Schulz iteration or exact by SVD."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from eckart.decompose.products import product
from eckart.errors import UsageError
from eckart.optim.inner import Direction, Inner, each, wide
from eckart.optim.part import State, Tensors, multiply_
from eckart.optim.project import Turn
from eckart.optim.sharded import Split, sum_symmetric_


@dataclass(frozen=True)
class Orthogonal(Inner):
    """R, or its momentum M = mu M + R, orthogonalised: its singular values are brought near 1 by
    Newton-Schulz steps (Muon, Jordan et al. 2024), or to exactly 1 by SVD (`exact`).

    With `nesterov` R + mu M is orthogonalised instead. Without `momentum` there is no state.
    """

    steps: int = 5
    momentum: float = 0.0
    nesterov: bool = False
    exact: bool = False
    elementwise: ClassVar[bool] = False
    sums: ClassVar[bool] = True

    def init(self, R: Tensor) -> dict[str, Tensor]:
        return {"momentum": torch.zeros_like(R)} if self.momentum else {}

    def step(
        self, R: Tensors, states: list[State], counts: list[int], fused: bool = False
    ) -> Direction:
        M = self.averaged(R, states)
        if self.exact:
            return Direction(each(exactly_orthogonal, M), None, [1.0] * len(R))
        found = each(lambda t: orthogonalised(t, self.steps), M)
        return Direction(found, None, [1.0] * len(R))

    def step_on_shards(
        self,
        R: Tensors,
        states: list[State],
        counts: list[int],
        shapes: Sequence[torch.Size],
        split: Split,
    ) -> Direction:
        """As `step`, with one collective: the sum of the unsharded dimension's Gram matrices."""
        if not (split.rows or split.columns):  # each expert is whole on some process
            return self.step(R, states, counts)
        if split.rows and split.columns:
            raise UsageError(
                "a matrix that is sharded along both dimensions cannot be made orthogonal",
                [("shape", " x ".join(map(str, shapes[0])))],
                "Shard it along its outputs (dimension 0) alone.",
            )
        M = self.averaged(R, states)
        turned = [m.mT if split.columns else m for m in M]  # [*, shards of a, b]
        grams = [r.mT @ r for r in (wide(r) for r in turned)]  # [*, b, b]
        sum_symmetric_(grams, split.rows or split.columns)
        N = [
            exactly_by(r, C) if self.exact else orthogonalised_by(r, C, self.steps)
            for r, C in zip(turned, grams, strict=True)
        ]
        return Direction([n.mT if split.columns else n for n in N], None, [1.0] * len(R))

    def averaged(self, R: Tensors, states: list[State]) -> Tensors:
        """Update the momentum and return the matrices to orthogonalise."""
        if not self.momentum:
            return R
        M = [s["momentum"] for s in states]
        multiply_(M, self.momentum)
        torch._foreach_add_(M, R)
        return list(torch._foreach_add(R, M, alpha=self.momentum)) if self.nesterov else M

    def rotate(self, state: State, turn: Turn, count: int) -> None:
        if self.momentum:
            state["momentum"].copy_(turn.mean(state["momentum"]))


def orthogonalised(R: Tensor, steps: int) -> Tensor:
    """Newton-Schulz on R [*, a, b]: singular values come within 0.3 of 1, singular vectors do
    not change."""
    X = wide(R) / (torch.linalg.matrix_norm(wide(R))[..., None, None] + 1e-7)
    tall = X.shape[-2] > X.shape[-1]
    X = X.mT if tall else X
    for _ in range(steps):
        C = product(X, X.mT)  # of the short side
        X = 3.4445 * X + product(-4.7750 * C + 2.0315 * product(C, C), X)
    return (X.mT if tall else X).to(R.dtype)


def orthogonalised_by(R: Tensor, C: Tensor, steps: int) -> Tensor:
    """`orthogonalised` for a shard of R's rows, given C = R^T R [*, b, b] of all rows.

    Each step multiplies R by a polynomial of C, so the polynomials are multiplied first.
    """
    length = C.diagonal(dim1=-2, dim2=-1).sum(-1).sqrt()[..., None, None] + 1e-7  # |R|
    C, eye = C / length**2, torch.eye(C.shape[-1], dtype=C.dtype, device=C.device)
    Q = eye / length
    for _ in range(steps):
        step = 3.4445 * eye - 4.7750 * C + 2.0315 * product(C, C)
        Q, C = product(Q, step), product(product(step, C), step)
    return product(wide(R), Q).to(R.dtype)


def exactly_orthogonal(R: Tensor) -> Tensor:
    """U V^T of R = U S V^T [*, a, b]; singular values of 0 stay 0. NaN where R is not finite."""
    ok = R.isfinite().all(-1, keepdim=True).all(-2, keepdim=True)
    U, s, Vh = torch.linalg.svd(torch.where(ok, wide(R), 0), full_matrices=False)
    found = (U * present(s, max(R.shape[-2:])).unsqueeze(-2)) @ Vh
    return torch.where(ok, found, torch.nan).to(R.dtype)


def exactly_by(R: Tensor, C: Tensor) -> Tensor:
    """`exactly_orthogonal` for a shard of R's rows, given C = R^T R [*, b, b]: R C^(-1/2).

    The Gram matrix squares the condition number: in fp32, singular values below about a
    thousandth of the largest are treated as 0.
    """
    ok = C.isfinite().all(-1, keepdim=True).all(-2, keepdim=True)
    values, V = torch.linalg.eigh(torch.where(ok, C, 0))
    there = present(values, C.shape[-1])
    inverse = torch.where(there > 0, values, 1.0).rsqrt() * there
    found = wide(R) @ (V * inverse.unsqueeze(-2)) @ V.mT
    return torch.where(ok, found, torch.nan).to(R.dtype)


def present(values: Tensor, size: int) -> Tensor:
    """1 for singular values (or eigenvalues) [*, k] above rounding error, else 0."""
    noise = torch.finfo(values.dtype).eps * size * values.amax(-1, keepdim=True)
    return (values > noise).to(values.dtype)
