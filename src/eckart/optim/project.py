"""Projectors: bases of low-rank subspaces of gradients, and projection to and from them.

A basis has a left part [*, m, r] with orthonormal columns, a right part [*, r, n] with
orthonormal rows, or both:

    down   R = left^T G right^T          a missing part is the identity
    up     left R right

G [*, m, n]; * are leading dimensions: layers of one shape that are refreshed together, and
fused experts.
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
Enough = Literal["rows", "columns", "all"]  # what a process needs of a row-sharded gradient
Side = Literal["auto", "reverse", "left", "right", "both"]


class Basis(NamedTuple):
    """The parts of a basis; None where a side is not projected."""

    left: Tensor | None  # [*, m, r]
    right: Tensor | None  # [*, r, n]


class Chosen(NamedTuple):
    """A subset of a matrix's columns, rows or entries, by index: no product is needed."""

    places: Tensor  # int64 [*, r]
    axis: int  # -1: columns, R is [*, m, r]; -2: rows, R is [*, r, n]
    entries: bool = False  # of all m n entries in one row: R is [*, 1, r]

    def lined(self, t: Tensor) -> Tensor:
        """The matrix t [*, m, n]; flattened to [*, 1, m n] for single entries."""
        return t.reshape(*t.shape[:-2], 1, -1) if self.entries else t

    def along(self, t: Tensor) -> Tensor:
        """The indices expanded to the shape that gather and scatter need on a (lined) matrix."""
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
    """A parameter or gradient reshaped to [*, m, n]: dimensions after the rows are flattened.

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
    """left R right, in R's dtype, as a full matrix. To update a weight use `add_up_`."""
    if basis.left is not None:
        R = basis.left.to(R.dtype) @ R
    return R if basis.right is None else R @ basis.right.to(R.dtype)


def add_up_(W: Tensor, R: Tensor, basis: Directions, *, alpha: float, beta: float = 1.0) -> None:
    """W = beta W + alpha up(R), in place and in one product, without storing up(R)."""
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
    """A transformation of moments from an old basis into a new one."""

    def mean(self, M: Tensor) -> Tensor:
        """A first moment in the new basis."""
        ...

    def variance(self, V: Tensor, M: Tensor, c1: float, c2: float) -> Tensor:
        """A second moment in the new basis, given the old first; c1, c2 = 1 - beta^count."""
        ...


class Rotation(NamedTuple):
    """The transformation between dense bases, from the inner products of their directions.

    right: X = P_old P_new^T, so that M X; left: X = P_new^T P_old, so that X M.
    """

    overlap: Basis

    def mean(self, M: Tensor) -> Tensor:
        return up(M, self.overlap)

    def variance(self, V: Tensor, M: Tensor, c1: float, c2: float) -> Tensor:
        """Rotates the variance with squared cosines and adds the squared rotated mean (LDAdam,
        Robert et al. 2025); abs, because estimation error may make the sum negative."""
        squares = Basis(*(None if t is None else t * t for t in self.overlap))
        V = up(V / c2 - (M / c1) ** 2, squares) + (self.mean(M) / c1) ** 2
        return (c2 * V).abs()


def fix_signs(vectors: Tensor, dim: int) -> Tensor:
    """Flip vectors along `dim` so that the largest entry of each is positive (the first on
    ties), so that singular vectors do not depend on the solver's choice of sign."""
    largest = vectors.gather(dim, vectors.abs().argmax(dim, keepdim=True))
    return torch.where(largest < 0, -vectors, vectors)


def polish(Q: Tensor) -> Tensor:
    """One Newton-Schulz step towards orthonormal columns: squares the orthogonality error of a
    decomposition (1e-6 in fp32), at the cost of two thin products."""
    return 1.5 * Q - 0.5 * product(Q, product(Q.mT, Q))


def usable(energy: Tensor) -> Tensor:
    """True where a squared norm is finite and not zero, so that a basis can be found."""
    return energy.isfinite() & (energy > 0)


@dataclass(frozen=True)
class Search:
    """The inputs from which a projector finds new bases, for k matrices of one shape."""

    G: Tensor  # [k, *, m, n] in fp32 or fp64, finite; maybe a shard of the rows or columns
    old: Mapping[str, Tensor]  # the current state tensors [k, *, ...]
    seeds: list[int]  # k seeds from names and steps, for random draws
    first: bool  # True where there is no old basis yet
    size: tuple[int, int]  # m and n of the whole matrices
    matrix: int = 0  # the index of G's first [m, n] among those of its parameter
    rows: Rows = field(default_factory=Rows)  # which rows of the whole G, or of G^T, G holds

    def across(self, Z: Tensor, from_left: bool) -> Tensor:
        """G^T Z (`from_left`), from this process's rows of Z [k, *, m, b]; or G Z for a whole
        Z [k, *, n, b], of which only this process's rows are returned."""
        if from_left:  # the result is column-major, as QR needs it
            return self.rows.total(product(Z.mT, self.G)).mT
        return product(self.G, Z)

    def squared(self, Z: Tensor, on_left: bool) -> Tensor:
        """G G^T Z for Z [k, *, m, b], or G^T G Z for Z [k, *, n, b]; whole on every process."""
        if on_left:
            return self.rows.whole(self.across(self.across(self.rows.part(Z), True), False))
        return self.across(self.across(Z, False), True)

    def reached(self, Z: Tensor, on_left: bool) -> Tensor:
        """G Z for Z [k, *, n, b] (`on_left`), or G^T Z for Z [k, *, m, b]; whole on every
        process."""
        if on_left:
            return self.rows.whole(self.across(Z, False))
        return self.across(self.rows.part(Z), True)


@dataclass(frozen=True)
class Projector(Part):
    """Interface of a projector."""

    identity: ClassVar[bool] = False
    names: ClassVar[tuple[str, ...]] = ("left", "right")  # of its state tensors, if present
    derived: ClassVar[bool] = False  # state is whole on all processes; the basis is made from it
    decomposes: ClassVar[bool] = True  # `find` uses a decomposition, which syncs with the device
    measures: ClassVar[bool] = False  # `find` also returns G's energy, as "energy"
    orthonormal: ClassVar[bool] = True  # the directions are orthonormal
    fleeting: ClassVar[bool] = False  # `find` returns a basis "left" that is used for one step

    def takes(self, shape: Sequence[int], leading: int) -> bool:
        """True where a parameter of this shape can be projected."""
        return len(shape) >= leading + 2

    def ranks(self, m: int, n: int) -> tuple[int, int]:
        """The ranks of the left and of the right part; 0 where a side is not projected."""
        return 0, 0

    def init(self, W: Tensor) -> dict[str, Tensor]:
        """Initial state tensors for W [*, m, n]: the basis of the first r coordinates."""
        raise NotImplementedError

    def basis(self, state: Mapping[str, Tensor], like: Tensor, size: tuple[int, int]) -> Directions:
        """The basis given by the state tensors, in the dtype and on the device of `like`."""
        return Basis(state.get("left"), state.get("right"))

    def find(self, search: Search) -> Found:
        """New state tensors [k, *, ...]; also R, as "low", where computing them yields it."""
        raise NotImplementedError

    def turn(
        self, old: Mapping[str, Tensor], new: Mapping[str, Tensor], size: tuple[int, int]
    ) -> Turn:
        """The transformation of moments from the old basis into the new one."""
        left = new["left"].mT @ old["left"] if "left" in old else None
        right = old["right"] @ new["right"].mT if "right" in old else None
        return Rotation(Basis(left, right))

    def from_shards(self, first: bool, size: tuple[int, int]) -> Enough:
        """What each process needs of G for `find`, in the first or a later search: its shard of
        the rows, a share of the columns, or all."""
        return "all"

    def from_gram(self, first: bool, size: tuple[int, int]) -> bool:
        """True where `find` returns G's exact leading singular vectors, which a Gram matrix
        gives too."""
        return False

    def unsplit(self) -> tuple[str, ...]:
        """The axes, "rows" or "columns", along which a parameter must not be sharded."""
        return ()

    def stored(self, found: Found) -> Found:
        """The state tensors that store a basis given as left [*, m, r] or right [*, r, n]."""
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
    """No projection, but gradients reach the inner rule as matrices [*, m, n], which Muon needs.
    Vectors follow the rule's `vectors`."""

    names: ClassVar[tuple[str, ...]] = ()

    def init(self, W: Tensor) -> Found:
        return {}


@dataclass(frozen=True)
class Subspace(Projector):
    """Projects one side of each matrix, or both, onto r orthonormal directions.

    side="auto" projects the short side (the right one of a square matrix), so that the moments
    have long side x r entries; "reverse" the long side. The rank is at most min(m, n); a float
    is a share of min(m, n).
    """

    rank: int | float
    side: Side = "auto"
    basis_dtype: Literal["param", "float32"] = "param"
    skip_if_no_saving: bool = False  # leave matrices out whose state would be as large as Adam's

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
    """The share `of` a size, rounded, at least 1."""
    return max(1, round(of * size))


def top_eigenvectors(C: Tensor, rank: int) -> Tensor:
    """The eigenvectors of the r largest eigenvalues of C [*, n, n], as columns [*, n, r]."""
    V = torch.linalg.eigh(C)[1].flip(-1)[..., :rank]  # eigenvalues come in ascending order
    return fix_signs(polish(V), -2)


def gaussian(rows: int, columns: int, seed: int) -> Tensor:
    """Standard normal numbers fp32 [rows, columns], drawn on the CPU: the same everywhere."""
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def parts(left: Draw, right: Draw, left_rank: int, right_rank: int) -> Found:
    """{"left": left(), "right": right()} without those of rank 0, which are not computed."""
    found = {"left": left} if left_rank else {}
    return {k: make() for k, make in (found | ({"right": right} if right_rank else {})).items()}
