"""Random bases that are never stored: each entry is a function of (seed, name, position).

A counter-based generator in integer arithmetic gives the same numbers on every device, in every
dtype and for any slice of a basis. So a file stores a seed instead of the matrices, a smaller
basis is a prefix of a larger one, and torch's generators are not touched.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator, Mapping
from typing import Any, Self

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from eckart.errors import FileError
from eckart.linear.term import Shared

GENERATOR = "two rounds of splitmix64, 24 bits"  # stored in files, since it decides the numbers
AT_ONCE = 1 << 22  # entries drawn in one piece: 32 MB of 64-bit integers


def keys_of(seed: int, name: str) -> tuple[int, int]:
    """Two 64-bit keys for a tensor, hashed so that no two tensors' keys are related."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    first, second = (int.from_bytes(digest[a : a + 8], "little", signed=True) for a in (0, 8))
    return first, second


def signed(value: int) -> int:
    """A 64-bit pattern as a signed integer, the only kind torch has."""
    return value - (1 << 64) if value >> 63 else value


def shifted(x: Tensor, by: int) -> Tensor:
    """Logical right shift of 64-bit patterns (torch's own is arithmetic)."""
    return (x >> by) & ((1 << (64 - by)) - 1)


def mix(x: Tensor) -> Tensor:
    """The finaliser of splitmix64: a bijection of 64 bits; each bit affects every other."""
    x = (x ^ shifted(x, 30)) * signed(0xBF58476D1CE4E5B9)
    x = (x ^ shifted(x, 27)) * signed(0x94D049BB133111EB)
    return x ^ shifted(x, 31)


def uniform(
    seed: int, name: str, i: range, j: range, k: range, device: torch.device | None = None
) -> Tensor:
    """Entries [i, j, k] of a tensor, in [-1, 1), fp32; the same for any slice and device.

    i and k below 2^20, j below 2^24. The keys enter through xor and a sum between two rounds, so
    that no tensor is a shifted window of another.
    """
    first, second = keys_of(seed, name)
    place = [torch.arange(r.start, r.stop, device=device) for r in (i, j, k)]
    counter = (place[0][:, None, None] << 44) | (place[1][:, None] << 20) | place[2]
    bits = shifted(mix(mix(counter ^ first) + second), 40)
    return bits.float() * 2.0**-23 - 1  # 24 bits: exact in fp32


def pieces(count: int, each: int) -> Iterator[range]:
    """Consecutive ranges that cover 0..count, at most AT_ONCE entries each; `each` per item."""
    step = max(1, AT_ONCE // max(1, each))
    for start in range(0, count, step):
        yield range(start, min(start + step, count))


class RandomBasis(Shared):
    """values [count, length, rank]: random matrices that many sites combine.

    Uniform in [-1, 1) or, with `sparsity` q > 0, -1 and 1 with probability 1 / 2q each and
    0 otherwise; times `scale`. They are drawn again when a file is loaded, unless they came
    from a file themselves (`stored`).
    """

    values: Tensor

    def __init__(
        self,
        seed: int,
        name: str,
        count: int,
        length: int,
        rank: int,
        scale: float = 1.0,
        sparsity: float = 0.0,
        stored: Tensor | None = None,
    ):
        super().__init__()
        self.seed, self.name, self.scale, self.sparsity = seed, name, scale, sparsity
        self.count, self.length, self.rank = count, length, rank
        self.generator = GENERATOR
        if stored is not None:
            self.register_buffer("values", stored)
        else:
            self.register_buffer("values", self.draw(), persistent=False)

    def draw(self) -> Tensor:
        """All entries, piece by piece."""
        values = torch.empty(self.count, self.length, self.rank)
        for i in pieces(self.count, self.length * self.rank):
            u = uniform(self.seed, self.name, i, range(self.length), range(self.rank))
            if self.sparsity:
                u = (u.abs() > 1 - 1 / self.sparsity) * u.sign()
            values[i.start : i.stop] = u * self.scale
        return values

    @classmethod
    def empty(cls, tensors: Mapping[str, Mapping[str, Any]], scalars: Mapping[str, Any]) -> Self:
        if tensors:
            return super().empty(tensors, scalars)
        if scalars["generator"] != GENERATOR:
            raise FileError(
                "the random basis of this file was drawn by another generator",
                [("in the file", scalars["generator"]), ("here", GENERATOR)],
                "Use the version of eckart that wrote it.",
            )
        return cls(**{k: v for k, v in scalars.items() if k != "generator"})

    def extra_repr(self) -> str:
        return f"{self.count} of {self.length} x {self.rank}"


def combine(coefficients: Tensor, basis: Tensor) -> Tensor:
    """sum_i c_i basis_i: c [*, k], basis [k, length, rank] -> [*, length, rank].

    One matrix product; a prefix of a longer basis is read in place.
    """
    return (coefficients @ basis.flatten(1).to(coefficients.dtype)).unflatten(-1, basis.shape[1:])


Drawn = tuple[int, str, int, int]
"""(seed, name, length, rank): a basis that is drawn piece by piece and never held whole."""


def in_pieces(coefficients: Tensor, basis: Tensor | Drawn) -> Iterator[tuple[Tensor, Tensor]]:
    """Coefficients [*, k] with slices of their basis [k, length, rank]; a stored one is whole."""
    if isinstance(basis, Tensor):
        yield coefficients, basis
        return
    seed, name, length, rank = basis
    for i in pieces(coefficients.shape[-1], length * rank):
        piece = uniform(seed, name, i, range(length), range(rank), coefficients.device)
        yield coefficients[..., i.start : i.stop], piece


def combined(coefficients: Tensor, basis: Tensor | Drawn, known: Tensor | None = None) -> Tensor:
    """`combine`, forward and backward, for a basis that is stored or drawn piece by piece.

    With `known`, the value found before for the same coefficients, up to a constant, the basis is
    only read or drawn for the gradient.
    """
    return Combined.apply(coefficients, basis, known)


class Combined(torch.autograd.Function):
    """See `combined`. Saved for the backward pass: the coefficients, and a stored basis."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, coefficients: Tensor, basis: Tensor | Drawn, known: Tensor | None
    ) -> Tensor:
        ctx.save_for_backward(coefficients)
        ctx.basis = basis
        if known is not None:
            return known.detach()
        return functools.reduce(
            torch.add, (combine(c, piece) for c, piece in in_pieces(coefficients, basis))
        )

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        (coefficients,) = ctx.saved_tensors
        flat = grad.flatten(-2)  # [*, length rank]
        parts = [
            flat @ piece.flatten(1).to(flat.dtype).mT
            for _, piece in in_pieces(coefficients, ctx.basis)
        ]
        return torch.cat(parts, dim=-1), None, None
