"""Spectral terms: y = scale * B diag(s) A x, a number for each rank component.

B [*, m, r], s [*, r], A [*, r, n]. With B and A frozen, s is all that is learnt (singular
values, LDU diagonals); with all three trained, s gates the components of a LoRA.
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor
from torch.nn import functional as F

from eckart.linear.factored import Factored
from eckart.linear.term import Pair, Product, by_expert, plain_mm


class Spectral(Factored):
    """scale * B diag(s) A, with each of the three trained or frozen."""

    rank_axes: ClassVar[dict[str, int]] = {"B": -1, "s": -1, "A": -2}
    B: Any
    s: Tensor
    A: Any
    scale: float

    def __init__(
        self,
        B: Tensor,
        s: Tensor,
        A: Tensor,
        scale: float = 1.0,
        *,
        trained: tuple[str, ...] = ("B", "s", "A"),
    ):
        super().__init__()
        self.scale = scale
        self.register("B", B, "B" in trained)
        self.register("s", s, "s" in trained)
        self.register("A", A, "A" in trained)

    def frames(self) -> tuple[Tensor, Tensor]:
        """B [*, m, r] and A [*, r, n], without s."""
        return self.B, self.A

    def gates(self) -> Tensor:
        """scale * s, [*, r]."""
        return self.scale * self.s

    def factors(self) -> tuple[Tensor, Tensor]:
        B, A = self.frames()
        return B * self.gates().unsqueeze(-2), A

    def pair(self) -> Pair | None:
        B, A = self.frames()
        return Pair(A, B * self.gates().unsqueeze(-2))

    def forward(self, x: Tensor) -> Tensor:  # [*, t, n] -> [*, t, m]
        B, A = self.frames()
        return spectral(x.to(A.dtype), A, self.gates(), B, self.mm)

    def back(self, x: Tensor) -> Tensor:  # [*, t, m] -> [*, t, n]
        B, A = self.frames()
        return spectral(x.to(A.dtype), B.mT, self.gates(), A.mT, self.mm)

    def columns(self, ids: Tensor) -> Tensor:  # [..] -> [.., m]
        B, A = self.frames()
        return self.mm(F.embedding(ids, A.mT) * self.gates(), B.mT)

    def grouped(self, x: Tensor, offsets: list[int]) -> Tensor:
        (B, A), gates = self.frames(), self.gates()
        return by_expert(
            x.to(A.dtype), offsets, lambda x, e: spectral(x, A[e], gates[e], B[e], self.mm)
        )


def spectral(x: Tensor, A: Tensor, s: Tensor, B: Tensor, mm: Product = plain_mm) -> Tensor:
    """B (s * (A x)): x [*, t, n] -> [*, t, m], s [*, r].

    ds_i = b_i^T G a_i comes from two thin products, never from G = dL/dW itself.
    """
    return mm(mm(x, A.mT) * s.unsqueeze(-2), B.mT)
