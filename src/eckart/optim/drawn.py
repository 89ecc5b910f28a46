"""Random subspaces, independent of the gradient: nothing is decomposed, and the stored basis is
a seed or a list of indices.

Draws depend only on (seed, parameter's name, step), so they are the same on every process and
after a resume.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from eckart.optim.fixed import Moves
from eckart.optim.project import (
    Basis,
    Chosen,
    Enough,
    Found,
    Projector,
    Search,
    Subspace,
    Turn,
    parts,
    share,
)

BITS = 2**32


@dataclass(frozen=True)
class Gaussian(Subspace):
    """r random directions with normal entries of variance 1/r, so that norms are kept on
    average: E |R|^2 = |G|^2. They are not orthonormal.

    Only a seed is stored; the basis is generated from it at each use.
    """

    names: ClassVar[tuple[str, ...]] = ("seed",)
    decomposes: ClassVar[bool] = False
    derived: ClassVar[bool] = True
    orthonormal: ClassVar[bool] = False

    def init(self, W: Tensor) -> Found:
        return {"seed": torch.zeros(W.shape[:-2], dtype=torch.int64, device=W.device)}

    def basis(self, state: Mapping[str, Tensor], like: Tensor, size: tuple[int, int]) -> Basis:
        seed, (left, right) = state["seed"], self.ranks(*size)
        found = parts(
            lambda: normals(seed, left, size[0]).mT.to(like.dtype) / math.sqrt(left),
            lambda: normals(seed, right, size[1]).to(like.dtype) / math.sqrt(right),
            left,
            right,
        )
        return Basis(found.get("left"), found.get("right"))

    def find(self, search: Search) -> Found:
        shape = search.G.shape[1:-2]  # fused experts have one seed each
        place = torch.arange(math.prod(shape), device=search.G.device).view(shape) + search.matrix
        return {"seed": torch.stack([seed + place for seed in search.seeds])}

    def from_shards(self, first: bool, size: tuple[int, int]) -> Enough:
        return "rows"


@dataclass(frozen=True)
class Coordinates(Projector):
    """A share of each matrix's columns, rows or single entries, drawn at random."""

    density: float = 0.25
    kind: Literal["columns", "rows", "entries"] = "columns"
    names: ClassVar[tuple[str, ...]] = ("index",)
    decomposes: ClassVar[bool] = False

    def ranks(self, m: int, n: int) -> tuple[int, int]:
        if self.kind == "rows":
            return share(self.density, m), 0
        return 0, share(self.density, n if self.kind == "columns" else m * n)

    def low(self, W: Tensor) -> Tensor:
        return super().low(W)[..., :1, :] if self.kind == "entries" else super().low(W)

    def unsplit(self) -> tuple[str, ...]:
        return {"columns": ("columns",), "rows": ("rows",)}.get(self.kind, ("rows", "columns"))

    def init(self, W: Tensor) -> Found:
        r = max(self.ranks(*W.shape[-2:]))
        index = torch.arange(r, dtype=self.index_dtype(W), device=W.device)
        return {"index": index.expand(*W.shape[:-2], r).clone()}

    def basis(self, state: Mapping[str, Tensor], like: Tensor, size: tuple[int, int]) -> Chosen:
        return Chosen(state["index"].long(), self.axis, self.kind == "entries")

    def find(self, search: Search) -> Found:
        size, r = self.choices(*search.size), max(self.ranks(*search.size))
        *shape, _, _ = search.G.shape
        last = search.matrix + math.prod(shape[1:])
        draws = [drawn(size, r, last, seed)[search.matrix :] for seed in search.seeds]
        return {"index": torch.stack(draws).view(*shape, r).to(search.G.device)}

    def from_shards(self, first: bool, size: tuple[int, int]) -> Enough:
        return "rows"

    def turn(
        self, old: Mapping[str, Tensor], new: Mapping[str, Tensor], size: tuple[int, int]
    ) -> Turn:
        return Moves(old["index"], new["index"], self.axis)

    @property
    def axis(self) -> int:
        return -2 if self.kind == "rows" else -1

    def choices(self, m: int, n: int) -> int:
        """The number of coordinates to draw from."""
        return {"columns": n, "rows": m}.get(self.kind, m * n)

    def index_dtype(self, W: Tensor) -> torch.dtype:
        return torch.int32 if self.choices(*W.shape[-2:]) < 2**31 else torch.int64


def drawn(size: int, r: int, times: int, seed: int) -> Tensor:
    """`times` draws of r distinct indices below `size`, each ascending, int64 [times, r]; drawn
    on the CPU, so the same on every machine."""
    generator = torch.Generator().manual_seed(seed)
    draws = [torch.randperm(size, generator=generator)[:r].sort().values for _ in range(times)]
    return torch.stack(draws) if draws else torch.empty(0, r, dtype=torch.int64)


def normals(seed: Tensor, rows: int, columns: int) -> Tensor:
    """Standard normal numbers fp32 [*, rows, columns] from seeds int64 [*], on their device.

    Each is a function of its seed and its index alone (Box and Muller 1958, on hashed
    indices), so there is no host sync, and devices agree on all bits up to the rounding of
    logarithm and cosine.
    """
    half = -(-rows * columns // 2)
    place = torch.arange(2 * half, device=seed.device)
    key = seed.unsqueeze(-1)  # [*, 1]
    bits = scrambled(scrambled(place ^ scrambled(key)) + key)  # [*, 2 half]
    first, second = bits[..., :half].float(), bits[..., half:].float()
    length = (-2 * ((first + 1) / BITS).log()).sqrt()
    angle = second * (2 * math.pi / BITS)
    found = torch.cat([length * angle.cos(), length * angle.sin()], -1)
    return found[..., : rows * columns].reshape(*seed.shape, rows, columns)


def scrambled(x: Tensor) -> Tensor:
    """A hash of the lower 32 bits of int64 numbers: invertible steps of xor-shift and products
    with odd constants, so distinct inputs stay distinct."""
    x = x & (BITS - 1)
    x = (x ^ (x >> 16)) * 0x7FEB352D & (BITS - 1)
    x = (x ^ (x >> 15)) * 0x846CA68B & (BITS - 1)
    return x ^ (x >> 16)
