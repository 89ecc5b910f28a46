"""What becomes of the part of a gradient that lies outside the subspace, and how it is held
in check.

A residual rule writes the weights itself, so that nothing of the size of G is ever made:
what scales lines of the long side commutes with a projection of the short side.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from eckart.optim.part import Part, Tensors
from eckart.optim.project import add_up_
from eckart.optim.sharded import sum_

if TYPE_CHECKING:
    from eckart.optim.bucket import Entry


@dataclass(frozen=True)
class NormGrowth(Part):
    """No term may be longer than `gamma` times what was left of it in the step before.

    q = max(n / (s + 1e-8), gamma) / gamma divides the term, of norm n; s = n / q is kept. A
    term of norm 0 says nothing and leaves s as it was.
    """

    gamma: float = 1.01

    def limit(self, n: Tensor, s: Tensor) -> Tensor:
        """q, like n; updates s in place. s = 0: there was no term yet."""
        q = torch.where(s > 0, (n / (s + 1e-8)).clamp(min=self.gamma) / self.gamma, 1.0)
        s.copy_(torch.where(n > 0, n / q, s))
        return q


@dataclass(frozen=True)
class Residual(Part):
    """The contract of a residual rule. It needs all of G, and one side unprojected."""

    def move(self, entries: list[Entry], N: Tensors, sizes: list[float], keep: float) -> None:
        """W = keep W - size U, where U is scale up(N) and what the rule makes of G - up(R).

        N is the direction before its bias correction, which is in the sizes.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class Rescaled(Residual):
    """Fira (Chen et al. 2024): the rest of the gradient, scaled line by line as the inner rule
    rescaled the part inside.

        phi_j = |N_j| / (|R_j| + 1e-8)          j runs over the long side, or is one for all
        S = phi (G - c up(R)) / q               q from the limiter
        U = scale up(N) + S = (phi / q) G + up(scale N - (c / q) phi R)

    c = scale where `center` is "scaled" (its code), 1 where it is "exact" (its paper). The
    norm of S follows from norms of lines, as the basis is orthonormal:
    |S|^2 = sum_j phi_j^2 (|G_j|^2 - (2c - c^2) |R_j|^2).
    """

    center: Literal["scaled", "exact"] = "scaled"
    phi: Literal["line", "matrix"] = "line"
    phi_max: float | None = None

    def move(self, entries: list[Entry], N: Tensors, sizes: list[float], keep: float) -> None:
        rule = entries[0].rule
        c = rule.scale if self.center == "scaled" else 1.0
        G = [e.view(e.gradient) for e in entries]
        psis = self.factors(entries, G, N, c)
        for e, g, n, psi, size in zip(entries, G, N, psis, sizes, strict=True):
            W, psi = e.weight, psi.to(n.dtype)
            inside = rule.scale * n - c * psi * e.R
            add_up_(W, inside, e.basis, alpha=-size, beta=keep)
            W.addcmul_(g.to(W.dtype), psi.to(W.dtype), value=-size)
            e.write(W)

    def factors(self, entries: list[Entry], G: Tensors, N: Tensors, c: float) -> Tensors:
        """phi / q for each entry: [*, m, 1] or [*, 1, n] where phi goes by lines, else
        [*, 1, 1]. One collective for lines and one for norms where the weights are sharded."""
        side = -1 if entries[0].basis.left is None else -2  # the projected one
        if c == 1 and N[0].shape[side] == min(entries[0].size):
            return [g.new_zeros(()) for g in G]  # full rank: what is left is rounding
        layout = entries[0].layout
        of_G = [squares(g, side) for g in G]
        if layout is not None:
            sum_(of_G, layout.partial)  # lines run along the projected side
        of_R, of_N = ([squares(t, side) for t in ts] for ts in ([e.R for e in entries], N))
        energy = [g - (2 * c - c * c) * r for g, r in zip(of_G, of_R, strict=True)]
        if self.phi == "matrix":
            totals = [t.sum(-side - 3, keepdim=True) for ts in (of_R, of_N, energy) for t in ts]
            if layout is not None:
                sum_(totals, layout.split)
            k = len(entries)
            of_R, of_N, energy = totals[:k], totals[k : 2 * k], totals[2 * k :]
        phi = [n.sqrt() / (r.sqrt() + 1e-8) for n, r in zip(of_N, of_R, strict=True)]
        if self.phi_max is not None:
            phi = [p.clamp(max=self.phi_max) for p in phi]
        limiter = entries[0].rule.limiter
        if limiter is None:
            return phi
        norms = [(p * p * e.clamp(min=0)).sum((-2, -1)) for p, e in zip(phi, energy, strict=True)]
        if layout is not None and self.phi == "line":
            sum_(norms, layout.split)
        q = [
            limiter.limit(n.sqrt(), e.tensors["limiter"])
            for n, e in zip(norms, entries, strict=True)
        ]
        return [p / x[..., None, None] for p, x in zip(phi, q, strict=True)]


def squares(t: Tensor, dim: int) -> Tensor:
    """Squared norms of lines along a dimension, which is kept; in fp32 at least."""
    wide = torch.promote_types(t.dtype, torch.float32)
    return torch.linalg.vector_norm(t, dim=dim, keepdim=True, dtype=wide).square()
