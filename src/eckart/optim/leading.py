"""Projections onto a gradient's leading singular directions, exact or approximate."""

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
    """The subspace of `SVD` from the eigenvectors of G^T G: several times as fast.

    The Gram matrix squares the condition number, so in fp32 singular vectors whose value is
    below a thousandth of the largest are noise; leading ones are exact to about 1e-4.
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
    """An approximation of that subspace by randomised SVD (Halko et al. 2011).

    `products` is the number of products with G or G^T that a random Z goes through: with 4
    G^T G G^T G Z, with 3 G^T G G^T Z.
    """

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
        """Approximate r leading singular vectors of one side, as columns [k, *, m or n, r].

        With the last G^T G Z = Q T, Q times the left singular vectors of T approximates those
        of G^T G, ordered by size, without a further product with G.
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
        return fix_signs(product(Z, V), -2)


def evened(Z: Tensor) -> Tensor:
    """Approximately orthonormal columns [*, n, k] with Z's span, in a third of a QR's time.

    Directions with less than a thousandth of a column's energy stay shorter.
    """
    C = product(Z.mT, Z)
    diagonal = C.diagonal(dim1=-2, dim2=-1)
    diagonal += 1e-3 * diagonal.mean(-1, keepdim=True)  # more than rounding can take away
    L, failed = torch.linalg.cholesky_ex(C)  # of zeros alone
    eye = torch.eye(C.shape[-1], dtype=C.dtype, device=C.device).expand_as(C)
    L = torch.where((failed > 0)[..., None, None], eye, L)
    return product(Z, torch.linalg.solve_triangular(L, eye, upper=False).mT)


@dataclass(frozen=True)
class Leading(Subspace):
    """`SVD` for narrow matrices and `Randomised` with three products for wide ones, where it is
    ten times as fast.

    Energy captured by 256 randomised directions, relative to the best basis of 256: 0.999 where
    singular values decay as 1 / i, 0.97 as 1 / sqrt(i), 0.86 for noise; 0.998 and more for
    gradients of a small Llama in its first 240 steps.
    """

    wide: int = 1024  # least length of the projected side that is wide

    def way(self, size: tuple[int, int]) -> SVD | Randomised:
        """The projector that finds the basis of a matrix of this size."""
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
    """The old basis, updated by power iteration: cheap, and it changes smoothly.

    The first basis is that of `SVD`.
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
        """Columns Z [k, *, m or n, r] after power iterations towards G's leading singular
        vectors of one side."""
        Z = Z.to(search.G.dtype)
        for _ in range(self.power):
            Q, R = torch.linalg.qr(search.squared(Z, on_left))
            signs = torch.where(R.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0).to(Q.dtype)
            Z = Q * signs.unsqueeze(-2)  # R's diagonal is positive, so Q is continuous in Z
        return polish(Z)


# by the values of the methods' field `search`
SEARCHES: dict[str, type[Subspace]] = {"auto": Leading} | {
    search.__name__.lower(): search for search in (SVD, Gram, Randomised, Iteration)
}
