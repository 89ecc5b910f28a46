"""Sources: what is projected instead of the gradient, such as gradient plus error feedback."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor

from eckart.optim.part import Part, State, counted
from eckart.optim.project import add_up_
from eckart.optim.storage import pack_rows, unpack_rows

if TYPE_CHECKING:
    from eckart.optim.entry import Entry


@dataclass(frozen=True)
class Source(Part):
    """Interface of a source."""

    names: ClassVar[tuple[str, ...]] = ()  # of its state tensors

    @property
    def lines(self) -> bool:
        """True where its state is stored per whole row, which must then not be sharded."""
        return False

    def init(self, W: Tensor) -> State:
        """The initial state tensors for a matrix W [*, m, n]."""
        raise NotImplementedError

    def receive(self, entry: Entry) -> Tensor:
        """The matrix A [*, m, n] to project at this step; may be a state tensor."""
        raise NotImplementedError

    def sought(self, entry: Entry, A: Tensor) -> Tensor:
        """The matrix that a new basis is computed from; by default A."""
        return A

    def turn(self, entry: Entry, sign: float) -> None:
        """Called before (sign 1) and after (sign -1) the basis is replaced."""

    def settle(self, entry: Entry, A: Tensor) -> None:
        """Store what the step does not use, once entry.R = left^T A right^T is known."""
        raise NotImplementedError


@dataclass(frozen=True)
class ErrorFeedback(Source):
    """A = G + E is projected, and E = A - up(R), the part outside the subspace, is kept.

    E is as large as the weights, which in 32 bits outweighs the saving. With 8 or 4 bits each
    row is quantised between its least and its greatest entry, rounded to nearest.

    With `beta`, the decay of Adam's first moment M, the part of M that a change of basis loses
    is added to A, too, times beta / (1 - beta), its weight in all later updates (LDAdam, Robert
    et al. 2025). `mix` is that rule's rho: the basis is computed from
    mix up(M) / (1 - beta^t) + (1 - mix) A.
    """

    bits: Literal[32, 8, 4] = 32
    beta: float | None = None
    mix: float = 0.0
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

    def sought(self, entry: Entry, A: Tensor) -> Tensor:
        count = counted(entry.state)
        if self.beta is None or self.mix == 0 or count == 0:
            return A
        b = (1 - self.mix) * A
        M = entry.tensors["exp_avg"]
        add_up_(b, M, entry.basis, alpha=self.mix / (1 - self.beta**count))
        return b

    def turn(self, entry: Entry, sign: float) -> None:
        """A += beta / (1 - beta) (up(M) before - up(M) after). The difference is orthogonal to
        the new subspace, so R does not change."""
        if self.beta is not None:
            weight = self.beta / (1 - self.beta)
            add_up_(entry.A, entry.tensors["exp_avg"], entry.basis, alpha=sign * weight)

    def settle(self, entry: Entry, A: Tensor) -> None:
        add_up_(A, entry.R, entry.basis, alpha=-1.0)
        if self.bits != 32:
            codes, ends = pack_rows(A, self.bits)
            entry.tensors["error"].copy_(codes)
            entry.tensors["error_ends"].copy_(ends)


@dataclass(frozen=True)
class Momentum(Source):
    """Momentum as large as the weights: B += G is projected, then B -= (1 - mu) up(R), so that
    only the part used in the step decays (Dion, Trion)."""

    mu: float = 0.95
    names: ClassVar[tuple[str, ...]] = ("buffer",)

    def init(self, W: Tensor) -> State:
        return {"buffer": torch.zeros_like(W)}

    def receive(self, entry: Entry) -> Tensor:
        return entry.tensors["buffer"].add_(entry.view(entry.gradient))

    def settle(self, entry: Entry, A: Tensor) -> None:
        add_up_(A, entry.R, entry.basis, alpha=-(1 - self.mu))
