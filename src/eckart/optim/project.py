"""Projectors: where the low-rank gradient lives, the way down and the way back.

A basis has a left part [*, m, r] with orthonormal columns, a right part [*, r, n] with
orthonormal rows, or both:

    down   R = left^T G right^T          what is not there is not multiplied
    up     left R right

so one pair of functions serves every side. G [*, m, n]; * are leading dimensions: layers
of one shape that are refreshed together, and fused experts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import ClassVar, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from eckart.decompose.products import add_product_, product
from eckart.optim.part import Part
from eckart.optim.sharded import Rows

Found = dict[str, Tensor]  # state tensors of a projector
Draw = Callable[[], Tensor]
Enough = Literal["rows", "columns", "all"]  # of a gradient that is sharded along its rows
Side = Literal["auto", "reverse", "left", "right", "both"]


class Basis(NamedTuple):
    """The parts of a basis; None where a side is not projected."""

    left: Tensor | None  # [*, m, r]
    right: Tensor | None  # [*, r, n]


class Chosen(NamedTuple):
    """Some coordinates of a matrix [*, m, n], by their numbers: no product is needed."""

    places: Tensor  # int64 [*, r]
    axis: int  # -1: columns, R is [*, m, r]; -2: rows, R is [*, r, n]
    entries: bool = False  # of all m n entries in one row: R is [*, 1, r]

    def lined(self, t: Tensor) -> Tensor:
        """A matrix as the places count it."""
        return t.reshape(*t.shape[:-2], 1, -1) if self.entries else t

    def along(self, t: Tensor) -> Tensor:
        """The places beside every line of a (lined) matrix."""
        places = self.places.unsqueeze(-3 - self.axis)
        shape = list(t.shape)
        shape[self.axis] = self.places.shape[-1]
        return places.expand(shape)

    def down(self, G: Tensor) -> Tensor:
        G = self.lined(G)
        return G.gather(self.axis, self.along(G))

    def add_up_(self, W: Tensor, R: Tensor, alpha: float, beta: float) -> None:
        lines = self.lined(W)
        lines.mul_(beta).scatter_add_(self.axis, self.along(lines), alpha * R)
        if lines.data_ptr() != W.data_ptr():
            W.copy_(lines.view_as(W))


Directions = Basis | Chosen


def as_matrix(t: Tensor, leading: int = 0) -> Tensor:
    """A parameter or gradient seen as [*, m, n]: all dimensions after the rows are one.

    `leading` dimensions are kept (fused experts have one). A convolution [out, in, kh, kw]
    becomes [out, in*kh*kw]. A view wherever strides allow.
    """
    return t.reshape(*t.shape[: leading + 1], -1) if t.dim() > leading + 2 else t


def down(G: Tensor, basis: Directions) -> Tensor:
    """left^T G right^T, in G's dtype."""
    if isinstance(basis, Chosen):
        return basis.down(G)
    if basis.left is not None:
        G = product(basis.left.to(G.dtype).mT, G)
    if basis.right is not None:
        G = product(G, basis.right.to(G.dtype).mT)
    return G


def up(R: Tensor, basis: Basis) -> Tensor:
    """left R right, in R's dtype: a full matrix. The step uses `add_up_` instead."""
    if basis.left is not None:
        R = basis.left.to(R.dtype) @ R
    return R if basis.right is None else R @ basis.right.to(R.dtype)


def add_up_(W: Tensor, R: Tensor, basis: Directions, *, alpha: float, beta: float = 1.0) -> None:
    """W = beta W + alpha up(R), in place and in one product: up(R) is never stored."""
    R = R.to(W.dtype)
    if isinstance(basis, Chosen):
        basis.add_up_(W, R, alpha, beta)
        return
    if basis.left is None and basis.right is None:
        W.mul_(beta).add_(R, alpha=alpha)
        return
    left = None if basis.left is None else basis.left.to(W.dtype)
    if basis.right is None:
        assert left is not None
        first, second = left, R
    else:
        first, second = (R if left is None else product(left, R)), basis.right.to(W.dtype)
    if W.dim() > 2:  # experts: [*, m, n] -> [e, m, n], views
        W, first, second = (t.reshape(-1, *t.shape[-2:]) for t in (W, first, second))
    add_product_(W, first, second, alpha, beta)


class Turn(Protocol):
    """What carries moments from an old basis into a new one."""

    def mean(self, M: Tensor) -> Tensor:
        """A first moment in the new basis."""
        ...

    def variance(self, V: Tensor, M: Tensor, c1: float, c2: float) -> Tensor:
        """A second moment in the new basis, given the old first; c1, c2 = 1 - beta^count."""
        ...


class Rotation(NamedTuple):
    """Between dense bases: the overlaps of their directions, applied as a basis is.

    right: X = P_old P_new^T, so that M X; left: X = P_new^T P_old, so that X M.
    """

    overlap: Basis

    def mean(self, M: Tensor) -> Tensor:
        return up(M, self.overlap)

    def variance(self, V: Tensor, M: Tensor, c1: float, c2: float) -> Tensor:
        """The variance turns with squared cosines, the squared mean as the mean does (LDAdam,
        Robert et al. 2025); their sum may fall below 0 by an estimate's error."""
        squares = Basis(*(None if t is None else t * t for t in self.overlap))
        V = up(V / c2 - (M / c1) ** 2, squares) + (self.mean(M) / c1) ** 2
        return (c2 * V).abs()


def fix_signs(vectors: Tensor, dim: int) -> Tensor:
    """Flip vectors along `dim` so that the largest entry of each is positive (the first on
    ties): singular vectors are then the same whatever LAPACK or cuSOLVER made of them."""
    largest = vectors.gather(dim, vectors.abs().argmax(dim, keepdim=True))
    return torch.where(largest < 0, -vectors, vectors)


def polish(Q: Tensor) -> Tensor:
    """One Newton-Schulz step to orthonormal columns: squares the error that a decomposition
    in this dtype left (1e-6 in fp32), for two thin products."""
    return 1.5 * Q - 0.5 * product(Q, product(Q.mT, Q))


def usable(energy: Tensor) -> Tensor:
    """Which matrices can give a basis, by their squared norms: neither zero nor not finite."""
    return energy.isfinite() & (energy > 0)


@dataclass(frozen=True)
class Search:
    """What a projector has to find new bases from, for k matrices of one shape."""

    G: Tensor  # [k, *, m, n] in fp32 or fp64, finite; maybe a share of the rows, or columns
    old: Mapping[str, Tensor]  # the state tensors so far [k, *, ...]
    seeds: list[int]  # k numbers from names and steps, for what is drawn
    first: bool  # the old basis says nothing yet
    size: tuple[int, int]  # m and n of the whole matrices
    matrix: int = 0  # the number of G's first [m, n] among those of its parameter
    rows: Rows = field(default_factory=Rows)  # which of them, or of G^T's, there are in G

    def across(self, Z: Tensor, from_left: bool) -> Tensor:
        """G^T Z of Z [k, *, m, b], of which this process needs its own rows alone, or G Z of
        Z [k, *, n, b], of which it finds its own rows alone."""
        if from_left:  # columns together, as a QR wants them
            return self.rows.total(product(Z.mT, self.G)).mT
        return product(self.G, Z)

    def squared(self, Z: Tensor, on_left: bool) -> Tensor:
        """G G^T Z of Z [k, *, m, b], or G^T G Z of Z [k, *, n, b]; whole on every process."""
        if on_left:
            return self.rows.whole(self.across(self.across(self.rows.part(Z), True), False))
        return self.across(self.across(Z, False), True)

    def reached(self, Z: Tensor, on_left: bool) -> Tensor:
        """G Z of Z [k, *, n, b], for the left, or G^T Z of Z [k, *, m, b]; whole."""
        if on_left:
            return self.rows.whole(self.across(Z, False))
        return self.across(self.rows.part(Z), True)


@dataclass(frozen=True)
class Projector(Part):
    """The contract of a projector."""

    identity: ClassVar[bool] = False
    names: ClassVar[tuple[str, ...]] = ("left", "right")  # of its state tensors, if present
    derived: ClassVar[bool] = False  # is its state whole on all processes, the basis made of it?
    decomposes: ClassVar[bool] = True  # and so must wait for the device at a search
    measures: ClassVar[bool] = False  # does a search also find how large G is, as "energy"?
    orthonormal: ClassVar[bool] = True  # are its directions?
    fleeting: ClassVar[bool] = False  # does its basis live for one step, found with its state?

    def takes(self, shape: Sequence[int], leading: int) -> bool:
        """Can a parameter of this shape be projected?"""
        return len(shape) >= leading + 2

    def ranks(self, m: int, n: int) -> tuple[int, int]:
        """The ranks of the left and of the right part; 0 where a side is not projected."""
        return 0, 0

    def init(self, W: Tensor) -> dict[str, Tensor]:
        """The state tensors of a basis to start from, for W [*, m, n]: some coordinates."""
        raise NotImplementedError

    def basis(self, state: Mapping[str, Tensor], like: Tensor, size: tuple[int, int]) -> Directions:
        """The basis that the state tensors stand for, in the dtype and place of `like`."""
        return Basis(state.get("left"), state.get("right"))

    def find(self, search: Search) -> Found:
        """New state tensors [k, *, ...]; where it is known by the way, also R, as "low"."""
        raise NotImplementedError

    def turn(
        self, old: Mapping[str, Tensor], new: Mapping[str, Tensor], size: tuple[int, int]
    ) -> Turn:
        """How moments go over from one basis to another."""
        left = new["left"].mT @ old["left"] if "left" in old else None
        right = old["right"] @ new["right"].mT if "right" in old else None
        return Rotation(Basis(left, right))

    def from_shards(self, first: bool, size: tuple[int, int]) -> Enough:
        """What of G does each process need for a search, the first one or a later one: a share of
        the rows, a share of the columns, or all?"""
        return "all"

    def from_gram(self, first: bool, size: tuple[int, int]) -> bool:
        """Are G's leading singular vectors the basis that a search finds?"""
        return False

    def unsplit(self) -> tuple[str, ...]:
        """Which axes of a sharded parameter, "rows" or "columns", must be whole."""
        return ()

    def stored(self, found: Found) -> Found:
        """The state tensors of a basis that is given as left [*, m, r] or right [*, r, n]."""
        return found

    def low(self, W: Tensor) -> Tensor:
        """An empty tensor of the shape and dtype of W's low-rank gradient."""
        *lead, m, n = W.shape
        left, right = self.ranks(m, n)
        return W.new_empty(*lead, left or m, right or n)


@dataclass(frozen=True)
class Identity(Projector):
    """No projection."""

    identity: ClassVar[bool] = True
    names: ClassVar[tuple[str, ...]] = ()


@dataclass(frozen=True)
class Whole(Projector):
    """No projection either, but what moves is a matrix [*, m, n]: for inner rules that need
    to know it. Vectors follow the rule's `vectors`."""

    names: ClassVar[tuple[str, ...]] = ()

    def init(self, W: Tensor) -> Found:
        return {}


@dataclass(frozen=True)
class Subspace(Projector):
    """Projects one side of each matrix, or both, on r orthonormal directions.

    auto projects the short side (the right one of a square matrix), so that the moments
    have long side x r entries; reverse the long side. A rank above min(m, n) is cut there; a
    float is a share of min(m, n).
    """

    rank: int | float
    side: Side = "auto"
    basis_dtype: Literal["param", "float32"] = "param"
    skip_if_no_saving: bool = False  # where Adam's own state would not be larger

    def ranks(self, m: int, n: int) -> tuple[int, int]:
        r = self.rank if isinstance(self.rank, int) else share(self.rank, min(m, n))
        r = min(r, m, n)
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

    def init(self, W: Tensor) -> Found:
        *lead, m, n = W.shape
        left, right = self.ranks(m, n)
        wide = torch.promote_types(W.dtype, torch.float32)
        dtype = wide if self.basis_dtype == "float32" else W.dtype

        def unit(rows: int, columns: int) -> Tensor:
            eye = torch.eye(rows, columns, dtype=dtype, device=W.device)
            return eye.expand(*lead, rows, columns).clone()

        return parts(lambda: unit(m, left), lambda: unit(right, n), left, right)


def share(of: float, size: int) -> int:
    """So much of a size, in whole numbers and at least 1."""
    return max(1, round(of * size))


def top_eigenvectors(C: Tensor, rank: int) -> Tensor:
    """The eigenvectors of the r largest eigenvalues of C [*, n, n], as columns [*, n, r]."""
    V = torch.linalg.eigh(C)[1].flip(-1)[..., :rank]  # eigenvalues come in ascending order
    return fix_signs(polish(V), -2)


def gaussian(rows: int, columns: int, seed: int) -> Tensor:
    """Standard normal numbers, the same on every machine: drawn on the CPU, in fp32."""
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def parts(left: Draw, right: Draw, left_rank: int, right_rank: int) -> Found:
    """The parts of a basis that have a rank."""
    found = {"left": left} if left_rank else {}
    return {k: make() for k, make in (found | ({"right": right} if right_rank else {})).items()}
