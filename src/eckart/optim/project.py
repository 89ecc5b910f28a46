"""Projectors: where the low-rank gradient lives, the way down and the way back.

A basis has a left part [*, m, r] with orthonormal columns, a right part [*, r, n] with
orthonormal rows, or both:

    down   R = left^T G right^T          what is not there is not multiplied
    up     left R right

so one pair of functions serves every side. G [*, m, n]; * are leading dimensions: layers
of one shape that are refreshed together, and fused experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from eckart.optim.part import Part

Side = Literal["auto", "reverse", "left", "right", "both"]


class Basis(NamedTuple):
    """The parts of a basis; None where a side is not projected."""

    left: Tensor | None  # [*, m, r]
    right: Tensor | None  # [*, r, n]


def as_matrix(t: Tensor, leading: int = 0) -> Tensor:
    """A parameter or gradient seen as [*, m, n]: all dimensions after the rows are one.

    `leading` dimensions are kept (fused experts have one). A convolution [out, in, kh, kw]
    becomes [out, in*kh*kw]. A view wherever strides allow.
    """
    return t.reshape(*t.shape[: leading + 1], -1) if t.dim() > leading + 2 else t


def down(G: Tensor, basis: Basis) -> Tensor:
    """left^T G right^T, in G's dtype."""
    if basis.left is not None:
        G = basis.left.to(G.dtype).mT @ G
    if basis.right is not None:
        G = G @ basis.right.to(G.dtype).mT
    return G


def up(R: Tensor, basis: Basis) -> Tensor:
    """left R right, in R's dtype: a full matrix. The step uses `add_up_` instead."""
    if basis.left is not None:
        R = basis.left.to(R.dtype) @ R
    return R if basis.right is None else R @ basis.right.to(R.dtype)


def add_up_(W: Tensor, R: Tensor, basis: Basis, *, alpha: float, beta: float = 1.0) -> None:
    """W = beta W + alpha up(R), in place and in one product: up(R) is never stored."""
    R = R.to(W.dtype)
    left = None if basis.left is None else basis.left.to(W.dtype)
    if basis.right is None:
        assert left is not None
        first, second = left, R
    else:
        first, second = (R if left is None else left @ R), basis.right.to(W.dtype)
    if W.dim() == 2:
        W.addmm_(first, second, alpha=alpha, beta=beta)
    else:
        flat = W.reshape(-1, *W.shape[-2:])  # experts: [*, m, n] -> [e, m, n], a view
        flat.baddbmm_(first.flatten(0, -3), second.flatten(0, -3), alpha=alpha, beta=beta)


def overlap(old: Basis, new: Basis) -> Basis:
    """What carries coordinates in the old basis into the new one, as up() would apply it.

    right: X = P_old P_new^T, so that M X; left: X = P_new^T P_old, so that X M.
    """
    left = None if old.left is None or new.left is None else new.left.mT @ old.left
    right = None if old.right is None or new.right is None else old.right @ new.right.mT
    return Basis(left, right)


def fix_signs(vectors: Tensor, dim: int) -> Tensor:
    """Flip vectors along `dim` so that the largest entry of each is positive (the first on
    ties): singular vectors are then the same whatever LAPACK or cuSOLVER made of them."""
    largest = vectors.gather(dim, vectors.abs().argmax(dim, keepdim=True))
    return torch.where(largest < 0, -vectors, vectors)


def polish(Q: Tensor) -> Tensor:
    """One Newton-Schulz step to orthonormal columns: squares the error that a decomposition
    in this dtype left (1e-6 in fp32), for two thin products."""
    return 1.5 * Q - 0.5 * Q @ (Q.mT @ Q)


def usable(G: Tensor) -> Tensor:
    """Which of the matrices [*, m, n] can give a basis: finite and not zero; bool [*]."""
    norm = torch.linalg.vector_norm(G, dim=(-2, -1))
    return norm.isfinite() & (norm > 0)


@dataclass(frozen=True)
class Projector(Part):
    """The contract of a projector."""

    identity: ClassVar[bool] = False
    from_gram: ClassVar[bool] = False  # is the right basis a function of G^T G?

    def takes(self, shape: Sequence[int], leading: int) -> bool:
        """Can a parameter of this shape be projected?"""
        return len(shape) >= leading + 2

    def ranks(self, m: int, n: int) -> tuple[int, int]:
        """The ranks of the left and of the right part; 0 where a side is not projected."""
        return 0, 0

    def init(self, W: Tensor) -> Basis:
        """A basis to start from for W [*, m, n]: the first coordinates."""
        raise NotImplementedError

    def find(self, G: Tensor, old: Basis) -> Basis:
        """A new basis for each of the matrices G [*, m, n], fp32 or fp64 and finite."""
        raise NotImplementedError

    def find_right(self, C: Tensor, rank: int) -> Tensor:
        """A new right basis [*, r, n] from the Gram matrices C = G^T G [*, n, n] in fp64, for
        projectors that offer `from_gram`."""
        raise NotImplementedError

    def low(self, W: Tensor) -> Tensor:
        """An empty tensor of the shape and dtype of W's low-rank gradient."""
        *lead, m, n = W.shape
        left, right = self.ranks(m, n)
        return W.new_empty(*lead, left or m, right or n)


@dataclass(frozen=True)
class Identity(Projector):
    """No projection."""

    identity: ClassVar[bool] = True


@dataclass(frozen=True)
class Subspace(Projector):
    """Projects one side of each matrix, or both, on r orthonormal directions.

    auto projects the short side (the right one of a square matrix), so that the moments
    have long side x r entries; reverse the long side. A rank above min(m, n) is cut there.
    """

    rank: int
    side: Side = "auto"
    basis_dtype: Literal["param", "float32"] = "param"
    skip_if_no_saving: bool = False  # where Adam's own state would not be larger

    def ranks(self, m: int, n: int) -> tuple[int, int]:
        r = min(self.rank, m, n)
        short = "right" if m >= n else "left"
        long = "left" if m >= n else "right"
        side = {"auto": short, "reverse": long}.get(self.side, self.side)
        return (r if side in ("left", "both") else 0, r if side in ("right", "both") else 0)

    def takes(self, shape: Sequence[int], leading: int) -> bool:
        if not super().takes(shape, leading):
            return False
        m, n = shape[leading], prod(shape[leading + 1 :])
        left, right = self.ranks(m, n)
        state = m * left + right * n + 2 * (left or m) * (right or n)
        return not (self.skip_if_no_saving and state >= 2 * m * n)

    def init(self, W: Tensor) -> Basis:
        *lead, m, n = W.shape
        left, right = self.ranks(m, n)
        wide = torch.promote_types(W.dtype, torch.float32)
        dtype = wide if self.basis_dtype == "float32" else W.dtype

        def unit(rows: int, columns: int) -> Tensor:
            eye = torch.eye(rows, columns, dtype=dtype, device=W.device)
            return eye.expand(*lead, rows, columns).clone()

        return Basis(unit(m, left) if left else None, unit(right, n) if right else None)


@dataclass(frozen=True)
class SVD(Subspace):
    """The leading singular vectors of the current gradient: the best rank-r subspace."""

    from_gram: ClassVar[bool] = True

    def find(self, G: Tensor, old: Basis) -> Basis:
        left, right = self.ranks(*G.shape[-2:])
        U, _, Vh = torch.linalg.svd(G, full_matrices=False)
        return Basis(
            fix_signs(polish(U[..., :left]), -2) if left else None,
            fix_signs(polish(Vh[..., :right, :].mT).mT, -1) if right else None,
        )

    def find_right(self, C: Tensor, rank: int) -> Tensor:
        V = torch.linalg.eigh(C)[1].flip(-1)[..., :rank]  # eigenvalues come in ascending order
        return fix_signs(V.mT, -1)
