"""Low-rank terms: y = scale * B phi(R A x).

B [*, m, r], A [*, r, n]; optional core R [*, r, r]; optional function phi between.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from eckart.linear.term import Pair, Product, Term, by_expert, plain_mm

RowFactor = Callable[[Tensor, Tensor, float], Tensor]


class LowRank(Term):
    """scale * B (R) A, with each tensor trained or frozen.

    `start`, if given, is a frozen pair (B0, A0) whose product is subtracted, so that a term with a
    nonzero initial product still starts at the base. `phi` names a function of torch.nn.functional
    between the factors and makes the term nonlinear. `dropout` acts on the input of A only.
    """

    rank_axes: ClassVar[dict[str, int]] = {"B": -1, "A": -2}
    branch_gradient: RowFactor | None = None
    """Set by an update rule on a plain pair: a row factor on the gradients of A and B, not of x."""
    B: Tensor
    A: Tensor
    R: Any  # a tensor or None, as are B0 and A0
    B0: Any
    A0: Any

    def __init__(
        self,
        B: Tensor,
        A: Tensor,
        scale: float = 1.0,
        *,
        R: Tensor | None = None,
        start: tuple[Tensor, Tensor] | None = None,
        phi: str = "",
        dropout: float = 0.0,
        trained: tuple[str, ...] = ("B", "A", "R"),
    ):
        super().__init__()
        self.scale, self.dropout, self.phi = scale, dropout, phi
        self.register("B", B, "B" in trained)  # [*, m, r]
        self.register("A", A, "A" in trained)  # [*, r, n]
        self.register("R", R, "R" in trained)  # [*, r, r]
        self.register("B0", start[0] if start else None, False)
        self.register("A0", start[1] if start else None, False)

    @classmethod
    def empty(cls, tensors: Mapping[str, Mapping[str, Any]], scalars: Mapping[str, Any]) -> Self:
        term = super().empty(tensors, scalars)
        for name in ("R", "B0", "A0"):
            if name not in tensors:
                term.register_buffer(name, None)
        return term

    @property
    def linear(self) -> bool:  # type: ignore[override]
        """Is there no function between the factors?"""
        return not self.phi

    @property
    def function(self) -> Callable[[Tensor], Tensor] | None:
        """The function between the factors."""
        return getattr(F, self.phi) if self.phi else None

    @property
    def plain_pair(self) -> bool:
        """Is it s B A and nothing else, with both factors trained? Row factors require this."""
        others = (self.R, self.B0, self.phi or None)
        return all(other is None for other in others) and {"A", "B"} <= set(self._parameters)

    @property
    def row_factor(self) -> Tensor | None:
        """The row factor [*, m] for the next backward pass; None if there is none."""
        if self.branch_gradient is None or not torch.is_grad_enabled():
            return None
        return self.branch_gradient(self.B.detach(), self.A.detach(), self.scale)

    def forward(self, x: Tensor) -> Tensor:
        x = self.dropped(x.to(self.A.dtype))
        if (c := self.row_factor) is not None:
            return RowScaled.apply(*autocast_to(x, self.A, self.B), c, self.scale, False)
        y = low_rank(x, self.A, self.B, self.scale, self.R, self.function, self.mm)
        return y if self.B0 is None else y - low_rank(x, self.A0, self.B0, self.scale, mm=self.mm)

    def back(self, x: Tensor) -> Tensor:  # [*, t, m] -> [*, t, n]
        x = x.to(self.A.dtype)
        if (c := self.row_factor) is not None:
            return RowScaled.apply(*autocast_to(x, self.A, self.B), c, self.scale, True)
        R = None if self.R is None else self.R.mT
        y = low_rank(x, self.B.mT, self.A.mT, self.scale, R, mm=self.mm)
        if self.B0 is None:
            return y
        return y - low_rank(x, self.B0.mT, self.A0.mT, self.scale, mm=self.mm)

    def columns(self, ids: Tensor) -> Tensor:  # [..] -> [.., m]
        h = F.embedding(ids, self.A.mT)  # [.., r]
        if (c := self.row_factor) is not None:
            return RowScaledProduct.apply(*autocast_to(h * self.scale, self.B), c)
        h = h if self.R is None else self.mm(h, self.R.mT)
        y = self.mm(h * self.scale, self.B.mT)
        if self.B0 is None:
            return y
        return y - self.mm(F.embedding(ids, self.A0.mT) * self.scale, self.B0.mT)

    def dense(self) -> Tensor:  # [*, m, n]
        if self.phi:
            return super().dense()
        B, A = self.exact_factors()
        return B @ A

    def factors(self) -> tuple[Tensor, Tensor] | None:
        return None if self.phi else self.exact_factors()

    def exact_factors(self) -> tuple[Tensor, Tensor]:
        """B [*, m, r'], A [*, r', n] with the scale in B; a start doubles the rank."""
        B = self.scale * (self.B if self.R is None else self.B @ self.R)
        if self.B0 is None:
            return B, self.A
        B = torch.cat([B, -self.scale * self.B0], dim=-1)
        return B, torch.cat([self.A, self.A0], dim=-2)

    def pair(self) -> Pair | None:
        dropped = self.dropout and self.training
        if self.R is not None or self.phi or dropped or self.branch_gradient is not None:
            return None
        start = None if self.B0 is None else (self.B0, self.A0)
        return Pair(self.A, self.B, self.scale, start)

    def grouped(self, x: Tensor, offsets: list[int]) -> Tensor:
        if self.R is not None or self.B0 is not None or self.branch_gradient is not None:
            return super().grouped(x, offsets)
        x, phi = self.dropped(x.to(self.A.dtype)), self.function
        return by_expert(
            x,
            offsets,
            lambda x, e: low_rank(x, self.A[e], self.B[e], self.scale, None, phi, self.mm),
        )

    def select(self, kept: Tensor) -> None:
        super().select(kept)
        if self.R is not None:  # a core has the components along both of its axes
            R = self.R.detach()
            for axis in (-2, -1):
                R = R.index_select(axis, kept.to(R.device))
            trained = isinstance(self.R, nn.Parameter)
            self.R = nn.Parameter(R, self.R.requires_grad) if trained else R

    def extra_repr(self) -> str:
        m, n, r = self.B.shape[-2], self.A.shape[-1], self.A.shape[-2]
        return f"{m} x {n}, rank {r}, scale {self.scale:g}"


def low_rank(
    x: Tensor,
    A: Tensor,
    B: Tensor,
    scale: float = 1.0,
    R: Tensor | None = None,
    phi: Callable[[Tensor], Tensor] | None = None,
    mm: Product = plain_mm,
) -> Tensor:
    """scale * B phi(R A x): x [*, t, n] -> [*, t, m]. The scale multiplies the thin tensors."""
    h = mm(x, A.mT)  # [*, t, r]
    h = h if R is None else mm(h, R.mT)
    h = h if phi is None else phi(h)
    return mm(h if scale == 1.0 else h * scale, B.mT)


def linear_plus_low_rank(x: Tensor, W: Tensor, bias: Tensor | None, pair: Pair) -> Tensor:
    """x W^T + bias + x (scale (B A - B0 A0))^T in W's dtype: the reference for a kernel.

    x [*, t, n], W [m, n]. Thin products use the factors' dtype, their sum with the base the base's.
    """
    y, wide = F.linear(x, W, bias), x.to(pair.A.dtype)
    part = low_rank(wide, pair.A, pair.B, pair.scale)
    if pair.start is not None:
        B0, A0 = pair.start
        part = part - low_rank(wide, A0, B0, pair.scale)
    return y + part.to(y.dtype)


class RowScaled(torch.autograd.Function):
    """scale * (x A^T) B^T, or transposed scale * (x B) A, whose backward multiplies each row of
    dL/d(B A) by `factor` [m] before the gradients of A and B are taken from it.

    dL/dx is unchanged, and `factor` is a constant. The m x n gradient is never formed: it is
    left^T right, with left [t, m] and right [t, n] the two ends of the map.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: Tensor, A: Tensor, B: Tensor, factor: Tensor, scale: float, back: bool
    ) -> Tensor:
        h = x @ (B if back else A.mT)  # [*, t, r]
        ctx.save_for_backward(x, None if back else h, A, B, factor.to(B.dtype))
        ctx.scale, ctx.back = scale, back
        return (h * scale) @ (A if back else B.mT)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, h, A, B, factor = ctx.saved_tensors
        into = ((dy @ (A.mT if ctx.back else B)) * ctx.scale) if ctx.needs_input_grad[0] else None
        dx = None if into is None else into @ (B.mT if ctx.back else A)
        left, right = (t.reshape(-1, t.shape[-1]) for t in ((x, dy) if ctx.back else (dy, x)))
        h = right @ A.mT if h is None else h.reshape(-1, h.shape[-1])  # [t, r]
        dB = factor[:, None] * (left.mT @ h) * ctx.scale  # [m, r]
        # the factor is inside the sum over rows: scaling B, not dy, avoids a [t, m] copy
        dA = ((left @ (factor[:, None] * B)) * ctx.scale).mT @ right  # [r, n]
        return dx, dA, dB, None, None, None


class RowScaledProduct(torch.autograd.Function):
    """h B^T, where h [.., r] holds columns of A: rows of dL/d(B A) are multiplied by `factor` [m].

    A is reached through h alone, so both gradients are scaled here.
    """

    @staticmethod
    def forward(ctx: Any, h: Tensor, B: Tensor, factor: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(h, B, factor.to(B.dtype))
        return h @ B.mT

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        h, B, factor = ctx.saved_tensors
        left, h = dy.reshape(-1, dy.shape[-1]), h.reshape(-1, h.shape[-1])
        return dy @ (factor[:, None] * B), factor[:, None] * (left.mT @ h), None


def autocast_to(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in the dtype that autocast uses for products; unchanged if autocast is off."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    return tuple(t.to(torch.get_autocast_dtype(device)) for t in tensors)
