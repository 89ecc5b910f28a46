"""Subspaces of a gradient's leading directions: the best one, and nearly that in less time."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from eckart.decompose.products import product
from eckart.optim.project import (
    Enough,
    Found,
    Search,
    Subspace,
    fix_signs,
    gaussian,
    parts,
    polish,
    top_eigenvectors,
)


@dataclass(frozen=True)
class SVD(Subspace):
    """The leading singular vectors of the current gradient: the best rank-r subspace."""

    def find(self, search: Search) -> Found:
        G, (left, right) = search.G, self.ranks(*search.size)
        U, _, Vh = torch.linalg.svd(G, full_matrices=False)
        return parts(
            lambda: fix_signs(polish(U[..., :left]), -2),
            lambda: fix_signs(polish(Vh[..., :right, :].mT).mT, -1),
            left,
            right,
        )

    def from_gram(self, first: bool, size: tuple[int, int]) -> bool:
        return True


@dataclass(frozen=True)
class Gram(Subspace):
    """The same subspace from the eigenvectors of G^T G: several times as fast.

    The Gram matrix squares the condition number, so directions a thousandfold weaker than
    the strongest are noise in fp32; a basis of leading ones is exact to about 1e-4.
    """

    def find(self, search: Search) -> Found:
        G, (left, right) = search.G, self.ranks(*search.size)
        return parts(
            lambda: top_eigenvectors(product(G, G.mT), left),
            lambda: top_eigenvectors(product(G.mT, G), right).mT,
            left,
            right,
        )

    def from_gram(self, first: bool, size: tuple[int, int]) -> bool:
        return True


@dataclass(frozen=True)
class Randomised(Subspace):
    """Nearly that subspace, from products with a few random directions (Halko et al. 2011):
    G^T G G^T G Z or, with one `products` less, G^T G G^T Z."""

    oversample: int = 8
    products: int = 4

    def find(self, search: Search) -> Found:
        left, right = self.ranks(*search.size)
        return parts(
            lambda: self.columns(search, left, on_left=True),
            lambda: self.columns(search, right, on_left=False).mT,
            left,
            right,
        )

    def from_shards(self, first: bool, size: tuple[int, int]) -> Enough:
        return "rows"

    def columns(self, search: Search, rank: int, on_left: bool) -> Tensor:
        """About the r leading singular vectors of one side, as columns [k, *, m or n, r].

        The last G^T G Z = Q T has nearly the left singular vectors that G^T G has, so those of
        T order Q's columns: no further product with G.
        """
        G, odd = search.G, self.products % 2 == 1
        length = search.size[0 if on_left != odd else 1]
        k = min(*search.size, rank + self.oversample)
        Z = torch.stack([gaussian(length, k, seed) for seed in search.seeds]).to(G.device, G.dtype)
        Z = Z.reshape(len(search.seeds), *(1,) * (G.dim() - 3), length, k)
        if odd:
            Z = evened(search.reached(Z, on_left))
        for _ in range(self.products // 2):
            Z, T = torch.linalg.qr(search.squared(Z, on_left))
        V = torch.linalg.eigh(T @ T.mT)[1].flip(-1)[..., :rank]
        near_eye = V.mT @ product(Z.mT, Z) @ V
        return fix_signs(product(Z, 1.5 * V - 0.5 * V @ near_eye), -2)  # polish(Z V), in less


def evened(Z: Tensor) -> Tensor:
    """Columns of Z's span [*, n, k] that are about as long as one another and about orthogonal,
    but for directions that hold less than a thousandth of a column: a third of a QR's time."""
    C = product(Z.mT, Z)
    diagonal = C.diagonal(dim1=-2, dim2=-1)
    diagonal += 1e-3 * diagonal.mean(-1, keepdim=True)  # more than rounding can take away
    L, failed = torch.linalg.cholesky_ex(C)  # of zeros alone
    eye = torch.eye(C.shape[-1], dtype=C.dtype, device=C.device).expand_as(C)
    L = torch.where((failed > 0)[..., None, None], eye, L)
    return product(Z, torch.linalg.solve_triangular(L, eye, upper=False).mT)


@dataclass(frozen=True)
class Leading(Subspace):
    """The exact subspace of narrow matrices; of wide ones, whose decompositions would hold a
    training up, nearly that: three random products, ten times as fast as an SVD.

    Where singular values fall as 1 / i they capture 0.999 of what the best basis of 256 does;
    where they fall as their root 0.97; of mere noise 0.86. Of gradients of a small Llama in its
    first 240 steps they captured 0.998 and more.
    """

    wide: int = 1024  # from this length of the projected side on

    def way(self, size: tuple[int, int]) -> SVD | Randomised:
        """What searches a matrix of this size."""
        projected = max(n for n, rank in zip(size, self.ranks(*size), strict=True) if rank)
        if projected < self.wide:
            return SVD(self.rank, self.side, self.basis_dtype)
        return Randomised(self.rank, self.side, self.basis_dtype, products=3)

    def find(self, search: Search) -> Found:
        return self.way(search.size).find(search)

    def from_gram(self, first: bool, size: tuple[int, int]) -> bool:
        return self.way(size).from_gram(first, size)

    def from_shards(self, first: bool, size: tuple[int, int]) -> Enough:
        return self.way(size).from_shards(first, size)


@dataclass(frozen=True)
class Iteration(Subspace):
    """The old basis, improved by power iteration: cheap, and it changes smoothly.

    The first basis is the exact one.
    """

    power: int = 1

    def from_gram(self, first: bool, size: tuple[int, int]) -> bool:
        return first

    def from_shards(self, first: bool, size: tuple[int, int]) -> Enough:
        return "all" if first else "rows"

    def find(self, search: Search) -> Found:
        if search.first:
            return SVD(self.rank, self.side, self.basis_dtype).find(search)
        old, (left, right) = search.old, self.ranks(*search.size)
        return parts(
            lambda: self.columns(search, old["left"], on_left=True),
            lambda: self.columns(search, old["right"].mT, on_left=False).mT,
            left,
            right,
        )

    def columns(self, search: Search, Z: Tensor, on_left: bool) -> Tensor:
        """Columns Z [k, *, m or n, r] turned towards G's leading singular vectors of one side."""
        Z = Z.to(search.G.dtype)
        for _ in range(self.power):
            Q, R = torch.linalg.qr(search.squared(Z, on_left))
            signs = torch.where(R.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0).to(Q.dtype)
            Z = Q * signs.unsqueeze(-2)  # the QR that changes as little as Z does
        return polish(Z)


# as the methods' `search` calls them
SEARCHES: dict[str, type[Subspace]] = {"auto": Leading} | {
    search.__name__.lower(): search for search in (SVD, Gram, Randomised, Iteration)
}
