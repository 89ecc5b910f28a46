"""What is projected in the gradient's place: the gradient and what earlier steps left over."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor

from eckart.optim.part import Part, State
from eckart.optim.project import add_up_
from eckart.optim.storage import pack_rows, unpack_rows

if TYPE_CHECKING:
    from eckart.optim.bucket import Entry


@dataclass(frozen=True)
class Source(Part):
    """The contract of a source."""

    names: ClassVar[tuple[str, ...]] = ()  # of its state tensors

    @property
    def lines(self) -> bool:
        """Is what it keeps stored by whole rows?"""
        return False

    def init(self, W: Tensor) -> State:
        """The state tensors beside a matrix W [*, m, n]."""
        raise NotImplementedError

    def receive(self, entry: Entry) -> Tensor:
        """A [*, m, n], to be projected at this step; may be the state itself."""
        raise NotImplementedError

    def settle(self, entry: Entry, A: Tensor) -> None:
        """Keep what the step does not use, once entry.R = left^T A right^T is known."""
        raise NotImplementedError


@dataclass(frozen=True)
class ErrorFeedback(Source):
    """A = G + E; then E = A - up(R): what the subspace cannot hold comes back next time.

    E is as large as the weights: in 32 bits it undoes the saving. 8 or 4 bits store each row
    between its least and its greatest entry, rounded to nearest.
    """

    bits: Literal[32, 8, 4] = 32
    names: ClassVar[tuple[str, ...]] = ("error", "error_ends")

    @property
    def lines(self) -> bool:
        return self.bits != 32

    def init(self, W: Tensor) -> State:
        zero = torch.zeros_like(W)
        if self.bits == 32:
            return {"error": zero}
        codes, ends = pack_rows(zero, self.bits)
        return {"error": codes, "error_ends": ends}

    def receive(self, entry: Entry) -> Tensor:
        E, G = entry.tensors["error"], entry.view(entry.gradient)
        if self.bits == 32:
            return E.add_(G)
        wide = unpack_rows(E, entry.tensors["error_ends"], self.bits, G.shape[-1])
        return wide.to(G.dtype).add_(G)

    def settle(self, entry: Entry, A: Tensor) -> None:
        add_up_(A, entry.R, entry.basis, alpha=-1.0)
        if self.bits != 32:
            codes, ends = pack_rows(A, self.bits)
            entry.tensors["error"].copy_(codes)
            entry.tensors["error_ends"].copy_(ends)


@dataclass(frozen=True)
class Momentum(Source):
    """B += G is projected; then B -= (1 - mu) up(R) (Dion, Trion): momentum as large as the
    weights, of which only what was used fades."""

    mu: float = 0.95
    names: ClassVar[tuple[str, ...]] = ("buffer",)

    def init(self, W: Tensor) -> State:
        return {"buffer": torch.zeros_like(W)}

    def receive(self, entry: Entry) -> Tensor:
        return entry.tensors["buffer"].add_(entry.view(entry.gradient))

    def settle(self, entry: Entry, A: Tensor) -> None:
        add_up_(A, entry.R, entry.basis, alpha=-(1 - self.mu))
