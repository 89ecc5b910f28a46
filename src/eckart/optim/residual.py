"""Rules for the part of a gradient outside the subspace, and the limit on its growth.

A residual rule updates the weights itself. A scaling of lines of the long side commutes with a
projection of the short side, so no temporary of G's size is needed.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor

from eckart.decompose.products import CACHED
from eckart.optim.inner import Direction, Inner, Memoryless
from eckart.optim.part import Part, Tensors, stacked
from eckart.optim.project import Subspace, add_up_
from eckart.optim.sharded import sum_

if TYPE_CHECKING:
    from eckart.optim.entry import Entry


@dataclass(frozen=True)
class NormGrowth(Part):
    """Limits an update's norm to `gamma` times its limited norm in the step before.

    An update of norm n is divided by q = max(n / (s + 1e-8), gamma) / gamma, and s = n / q is
    kept for the next step. An update of norm 0 leaves s unchanged.
    """

    gamma: float = 1.01

    def limit(self, n: Tensor, s: Tensor) -> Tensor:
        """q, shaped like n; updates s in place. s = 0 before the first update."""
        q = torch.where(s > 0, (n / (s + 1e-8)).clamp(min=self.gamma) / self.gamma, 1.0)
        s.copy_(torch.where(n > 0, n / q, s))
        return q


@dataclass(frozen=True)
class Residual(Part):
    """Interface of a residual rule. It needs the full G, and one side unprojected."""

    orthonormal: ClassVar[bool] = True  # requires an orthonormal basis

    def move(self, entries: list[Entry], direction: Direction, rate: float, keep: float) -> None:
        """W = keep W - rate U, where U is scale up(N) plus the rule's use of the rest of G. N
        is given by `direction`, its bias correction not yet applied."""
        raise NotImplementedError


@dataclass(frozen=True)
class Rescaled(Residual):
    """Fira (Chen et al. 2024): applies the rest of the gradient, each line scaled by the factor
    by which the inner rule scaled the projected one.

        phi_j = |N_j| / (|R_j| + 1e-8)          j runs over the long side, or one phi for all
        S = phi (G - c up(R)) / q               q from the limiter
        U = scale up(N) + S = (phi / q) G + scale up(N - (c / scale) (phi / q) R)

    c = scale where `center` is "scaled" (its code), 1 where it is "exact" (its paper). The
    norm of S follows from norms of lines, as the basis is orthonormal:
    |S|^2 = sum_j phi_j^2 (|G_j|^2 - (2c - c^2) |R_j|^2).
    """

    center: Literal["scaled", "exact"] = "scaled"
    phi: Literal["line", "matrix"] = "line"
    phi_max: float | None = None

    def move(self, entries: list[Entry], direction: Direction, rate: float, keep: float) -> None:
        rule = entries[0].rule
        c = rule.scale if self.center == "scaled" else 1.0
        N, correction = direction.raw()
        low, R = stacked(N), stacked([e.R for e in entries])  # [k, *, a, b]
        if c == 1 and spans(entries[0]):
            psi = low.new_zeros(len(entries), 1, 1)
        else:
            psi = factors(entries, R, low, c, self.phi, self.phi_max).to(low.dtype)
        inside = torch.addcmul(low, psi.to(R.dtype), R, value=-c / rule.scale)
        for e, n, p, x in zip(entries, inside, psi, correction, strict=True):
            W, g, size = e.weight, e.view(e.gradient), rate / x
            add_up_(W, n, e.basis, alpha=-size * rule.scale, beta=keep)
            W.addcmul_(g.to(W.dtype), p.to(W.dtype), value=-size)
            e.write(W)


@dataclass(frozen=True)
class Replaced(Residual):
    """APOLLO (Zhu et al. 2025): applies the full gradient, each line scaled by the factor by
    which the inner rule scaled the projected one; the projection has no other use.

        phi_j = |N_j| / (|R_j| + 1e-8)          j runs over the long side, or one phi for all
        U = scale phi G / q                     q from the limiter
    """

    phi: Literal["line", "matrix"] = "line"
    orthonormal: ClassVar[bool] = False

    def move(self, entries: list[Entry], direction: Direction, rate: float, keep: float) -> None:
        N, correction = direction.raw()
        R = stacked([e.R for e in entries])
        psis = factors(entries, R, stacked(N), 0.0, self.phi)
        for e, psi, x in zip(entries, psis, correction, strict=True):
            W, g, size = e.weight, e.view(e.gradient), rate * e.rule.scale / x
            W.mul_(keep).addcmul_(g.to(W.dtype), psi.to(W.dtype), value=-size)
            e.write(W)


@dataclass(frozen=True)
class Outside(Residual):
    """FRUGAL (Zmushko et al. 2024): applies the rest of the gradient, G - up(R), through an inner
    rule without state. The rest is computed for one matrix at a time."""

    inner: Inner = field(default_factory=Memoryless)

    def move(self, entries: list[Entry], direction: Direction, rate: float, keep: float) -> None:
        N = direction.tensors()
        for e, n, x in zip(entries, N, direction.correction, strict=True):
            W, basis = e.weight, e.basis
            add_up_(W, n, basis, alpha=-rate * e.rule.scale / x, beta=keep)
            if not spans(e):
                rest = e.view(e.gradient).clone()
                add_up_(rest, e.R, basis, alpha=-1.0)
                (step,) = self.inner.step([rest], [{}], [1]).tensors()
                W.add_(step.to(W.dtype), alpha=-rate)
            e.write(W)


def spans(entry: Entry) -> bool:
    """True where the subspace is the whole space, so that the rest is rounding error."""
    projector, size = entry.rule.projector, entry.size
    return isinstance(projector, Subspace) and max(projector.ranks(*size)) == min(size)


def factors(
    entries: list[Entry],
    R: Tensor,
    N: Tensor,
    c: float,
    by: Literal["line", "matrix"],
    most: float | None = None,
) -> Tensor:
    """phi / q, [k, *, m, 1] or [k, *, 1, n] for one phi per line, else [k, *, 1, 1].

    q limits S = phi (G - c up(R)). R [k, *, a, b]; N, of the same shape, is the direction
    before its bias correction. Sharded weights need one collective for lines and one for norms.
    """
    rule, layout = entries[0].rule, entries[0].layout
    side = -2 if rule.projector.ranks(*entries[0].size)[0] else -1  # the projected one
    of_G = stacked([norms(e.view(e.gradient), side) for e in entries]).square()
    if layout is not None:
        sum_([of_G], layout.partial)  # lines run along the projected side
    of_R, of_N = squares(R, side), squares(N, side)
    energy = of_G - (2 * c - c * c) * of_R
    if by == "matrix":
        of_R, of_N, energy = (t.sum(-side - 3, keepdim=True) for t in (of_R, of_N, energy))
        if layout is not None:
            sum_([of_R, of_N, energy], layout.own.split)
    phi = of_N.sqrt() / (of_R.sqrt() + 1e-8)
    if most is not None:
        phi = phi.clamp(max=most)
    if rule.limiter is None:
        return phi
    lengths = (phi * phi * energy.clamp(min=0)).sum((-2, -1))
    if layout is not None and by == "line":
        sum_([lengths], layout.own.split)
    return phi / held_back(entries, lengths, rule.limiter)


def limited(entries: list[Entry], N: Tensors, limiter: NormGrowth) -> Tensors:
    """N divided by the limiter's q. |N| = |up(N)|, as the basis is orthonormal."""
    low = stacked(N)
    lengths = squares(low, -1).sum((-2, -1))
    layout = entries[0].layout
    if layout is not None:
        sum_([lengths], layout.own.split)
    return list(low / held_back(entries, lengths, limiter).to(low.dtype))


def held_back(entries: list[Entry], lengths: Tensor, limiter: NormGrowth) -> Tensor:
    """The limiter's q [k, *, 1, 1] from squared norms [k, *]; updates the limiter's state."""
    states = [e.tensors["limiter"] for e in entries]
    before = torch.stack(states)
    q = limiter.limit(lengths.sqrt(), before)
    torch._foreach_copy_(states, list(before.unbind()))
    return q[..., None, None]


def squares(t: Tensor, dim: int) -> Tensor:
    """Squared norms of lines along a dimension, which is kept; in fp32 at least."""
    return norms(t, dim).square()


def norms(t: Tensor, dim: int) -> Tensor:
    """Norms of lines along a dimension, which is kept; in fp32 at least."""
    wide = torch.promote_types(t.dtype, torch.float32)
    if t.is_cpu and dim == -2:  # here torch.linalg.vector_norm takes ten times as long
        rows = max(1, CACHED // max(1, t[..., :1, :].numel()))
        sums = [part.to(wide).square().sum(dim, keepdim=True) for part in t.split(rows, dim)]
        return (sums[0] if len(sums) == 1 else torch.stack(sums).sum(0)).sqrt()
    return torch.linalg.vector_norm(t, dim=dim, keepdim=True, dtype=wide)
