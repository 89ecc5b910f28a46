"""Fixed orthogonal bases, shared by all matrices of one width: each matrix stores only the r
indices of the directions that it uses.

Q [n, n] has the directions as columns. S = A Q are the coordinates of A's rows; R consists of
the r largest columns of S, so that it needs no second product.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from eckart.decompose.products import CACHED, product
from eckart.errors import UsageError
from eckart.optim.part import CHUNK, Tensors
from eckart.optim.project import Basis, Enough, Found, Search, Subspace, Turn, gaussian

FAST = 256  # from here on an FFT beats the product on a CPU: 3x at 256 directions, 7x at 1024
Kind = Literal["dct2", "dct3", "hadamard", "random"]


class Moves(NamedTuple):
    """Carries moments from one choice of directions to another: a direction that stays keeps
    its moments, a new one starts at 0. Values are only copied, never recomputed."""

    old: Tensor  # [*, r] ascending
    new: Tensor  # [*, r] ascending
    axis: int  # of the moments, along which the directions lie

    def mean(self, M: Tensor) -> Tensor:
        place = torch.searchsorted(self.old, self.new).clamp(max=self.old.shape[-1] - 1)
        stays = self.old.gather(-1, place) == self.new
        return picked(M, place, self.axis).masked_fill_(~stays.unsqueeze(-3 - self.axis), 0)

    def variance(self, V: Tensor, M: Tensor, c1: float, c2: float) -> Tensor:
        return self.mean(V)


@dataclass(frozen=True)
class Selected(Subspace):
    """The r directions of a fixed basis with the largest coordinates (DCT-AdamW, Trion).

    `norm` ranks directions by the sum of magnitudes (1) or of squares (2) over the long side;
    ties go to the lower index. `route`: "fft" computes a dct2 in n log n by Makhoul's
    algorithm; "auto" does so where it is faster: on a CPU, from 256 directions on.
    """

    kind: Kind = "dct2"
    norm: Literal[1, 2] = 1
    route: Literal["auto", "matmul", "fft"] = "auto"
    names: ClassVar[tuple[str, ...]] = ("index",)
    decomposes: ClassVar[bool] = False
    measures: ClassVar[bool] = True
    derived: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.route == "fft" and self.kind != "dct2":
            raise UsageError(
                "only the dct2 basis has an fft route",
                [("basis", self.kind)],
                "Take route=matmul, or basis=dct2.",
            )
        if self.side == "both":
            raise UsageError("a fixed basis serves one side", [("side", "both")], "Take side=auto.")

    def init(self, W: Tensor) -> Found:
        rank = max(self.ranks(*W.shape[-2:]))
        index = torch.arange(rank, dtype=torch.int32, device=W.device)
        return {"index": index.expand(*W.shape[:-2], rank).clone()}

    def basis(self, state: Mapping[str, Tensor], like: Tensor, size: tuple[int, int]) -> Basis:
        on_left = self.ranks(*size)[0] > 0
        Q = directions(self.kind, size[0] if on_left else size[1], like.dtype, like.device)
        rows = Q.mT[state["index"].long()]  # [*, r, n]
        return Basis(rows.mT, None) if on_left else Basis(None, rows)

    def find(self, search: Search) -> Found:
        left, right = self.ranks(*search.size)
        axis = -2 if left else -1  # of the coordinates
        S = self.coordinates(search.G, axis)
        score = search.rows.total(S.sizes(self.norm))  # [k, *, n]
        order = score.sort(dim=-1, descending=True, stable=True).indices
        index = order[..., : left or right].sort(-1).values
        low = S.picked(index)
        if left:
            low = search.rows.whole(low.mT).mT
        return {"index": index, "low": low, "energy": score.sum(-1)}

    def from_shards(self, first: bool, size: tuple[int, int]) -> Enough:
        """On the left a coordinate is a sum over all rows, so each of p processes transforms
        its share of the columns. It sends m n / p + r n + m numbers; gathering G sends m n."""
        return "columns" if self.ranks(*size)[0] else "rows"

    def coordinates(self, G: Tensor, axis: int) -> Products | Transforms:
        """Q^T G (axis -2) or G Q (axis -1) of G [k, *, m, n]."""
        auto = self.route == "auto" and self.kind == "dct2" and G.is_cpu
        if self.route == "fft" or (auto and G.shape[axis] >= FAST):
            lines = G.mT if axis == -2 else G
            most = CACHED // 4 if G.is_cpu else CHUNK  # of which there are four copies at once
            part = max(1, most // lines[..., :1, :].numel())
            return Transforms([dct2(some) for some in lines.split(part, -2)], axis, G.shape[axis])
        Q = directions(self.kind, G.shape[axis], G.dtype, G.device)
        if axis == -1:
            return Products(product(G.flatten(0, -2), Q).view(G.shape), axis)
        lines = G.reshape(-1, *G.shape[-2:])
        return Products(product(Q.mT.expand(len(lines), -1, -1), lines).view(G.shape), axis)

    def turn(
        self, old: Mapping[str, Tensor], new: Mapping[str, Tensor], size: tuple[int, int]
    ) -> Turn:
        return Moves(old["index"], new["index"], -2 if self.ranks(*size)[0] else -1)


class Products(NamedTuple):
    """Coordinates computed by a matrix product."""

    S: Tensor  # [*, m, n], directions along `axis`
    axis: int

    def sizes(self, norm: int) -> Tensor:
        """The sum of magnitudes or of squares for each direction, [*, n]."""
        return magnitudes(self.S, norm).sum(-3 - self.axis)

    def picked(self, index: Tensor) -> Tensor:
        """R: the coordinates of the directions index [*, r]."""
        return picked(self.S, index, self.axis)


class Transforms(NamedTuple):
    """Coordinates as `dct2` returns them, in cache-sized parts [*, t, 2 (n // 2 + 1)].

    Only the picked ones are put in order, never all.
    """

    parts: Tensors
    axis: int  # of the gradient along which lines lie
    n: int

    def sizes(self, norm: int) -> Tensor:
        sums = [magnitudes(part, norm).sum(-2) for part in self.parts]
        return torch.stack(sums).sum(0)[..., order(self.n, sums[0].device)[0]]

    def picked(self, index: Tensor) -> Tensor:
        places, signs = (t[index] for t in order(self.n, index.device))
        R = torch.cat([picked(part, places, -1) for part in self.parts], -2)
        R *= signs.unsqueeze(-2)
        return R.mT if self.axis == -2 else R


def magnitudes(S: Tensor, norm: int) -> Tensor:
    return S.abs() if norm == 1 else S * S


def picked(t: Tensor, index: Tensor, axis: int) -> Tensor:
    """The rows (axis -2) or columns (axis -1) of t [*, m, n] that index [*, r] names."""
    if index.shape[:-1].numel() == 1:
        return t.index_select(axis, index.flatten())
    line = index.unsqueeze(-3 - axis)  # [*, r, 1], or [*, 1, r]
    shape = list(t.shape)
    shape[axis] = index.shape[-1]
    return t.gather(axis, line.expand(shape))


@cache
def directions(kind: Kind, n: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The orthogonal matrix Q [n, n] of this kind; computed in fp64, then cast."""
    if kind == "hadamard":
        if n & (n - 1):
            raise UsageError(
                "a Hadamard basis needs a power of two",
                [("width of the projected side", str(n))],
                "Take basis=dct2.",
            )
        Q = torch.ones(1, 1, dtype=torch.float64)
        while len(Q) < n:
            Q = torch.cat([torch.cat([Q, Q], 1), torch.cat([Q, -Q], 1)])
        Q = Q / math.sqrt(n)
    elif kind == "random":
        Q = torch.linalg.qr(gaussian(n, n, seed=n).double())[0]
    else:
        C = cosines(n)
        Q = C.T if kind == "dct2" else C
    return Q.to(device, dtype).contiguous()


def cosines(n: int) -> Tensor:
    """The orthonormal DCT-II matrix C [n, n] in fp64: row i is direction i.

    The angle is reduced modulo 2 pi as an integer, since cos of a large angle loses digits.
    """
    i = torch.arange(n)
    angle = i[:, None] * (2 * i + 1) % (4 * n)
    C = torch.cos(angle.double() * (math.pi / (2 * n))) * math.sqrt(2 / n)
    C[0] *= math.sqrt(0.5)
    return C


def dct2(A: Tensor) -> Tensor:
    """A C^T for rows of A [*, n], by one real FFT of the same length (Makhoul 1980).

    Returns [*, 2 (n // 2 + 1)], real and imaginary parts; `order` has the column of each
    direction.
    """
    n = A.shape[-1]
    spread = torch.cat([A[..., ::2], A[..., 1::2].flip(-1)], -1)
    F = torch.fft.rfft(spread)  # [*, n // 2 + 1]
    return torch.view_as_real(F.mul_(turns(n, F.dtype, F.device))).flatten(-2)


@cache
def order(n: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The column and sign of each direction i in the output of `dct2`, two [n].

    Directions up to n / 2 are real parts; the others are negated imaginary parts, backwards.
    """
    i = torch.arange(n, device=device)
    real = i <= n // 2
    return torch.where(real, 2 * i, 2 * (n - i) + 1), torch.where(real, 1, -1)


@cache
def turns(n: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """sqrt(2 / n) exp(-i pi k / 2n) for k = 0..n // 2, with k = 0 divided by sqrt(2)."""
    k = torch.arange(n // 2 + 1, dtype=torch.float64)
    turn = torch.polar(torch.ones_like(k), -math.pi * k / (2 * n)) * math.sqrt(2 / n)
    turn[0] *= math.sqrt(0.5)
    return turn.to(device, dtype)
