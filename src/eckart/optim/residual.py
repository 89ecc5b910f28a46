"""What becomes of the part of a gradient that lies outside the subspace, and how it is held
in check.

A residual rule writes the weights itself, so that what scales lines of the long side makes
nothing of the size of G: it commutes with a projection of the short side.
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

    orthonormal: ClassVar[bool] = True  # must the basis be?

    def move(self, entries: list[Entry], direction: Direction, rate: float, keep: float) -> None:
        """W = keep W - rate U, where U is scale up(N), and what the rule makes of the rest of
        G. Each N still has its bias correction before it."""
        raise NotImplementedError


@dataclass(frozen=True)
class Rescaled(Residual):
    """Fira (Chen et al. 2024): the rest of the gradient, scaled line by line as the inner rule
    rescaled the part inside.

        phi_j = |N_j| / (|R_j| + 1e-8)          j runs over the long side, or is one for all
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
    """APOLLO (Zhu et al. 2025): the whole gradient, scaled line by line as the inner rule
    rescaled its projection, which serves for nothing else.

        phi_j = |N_j| / (|R_j| + 1e-8)          j runs over the long side, or is one for all
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
    """FRUGAL (Zmushko et al. 2024): the rest of the gradient, G - up(R), through an inner rule
    without a state. The rest is formed, for one matrix at a time."""

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
    """Does the subspace hold everything, so that what is left of a gradient is rounding?"""
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
    """phi / q [k, *, m, 1] or [k, *, 1, n] where phi goes by lines, else [k, *, 1, 1].

    S = phi (G - c up(R)) is what the limiter holds back. R [k, *, a, b], and N alike, is the
    direction before its bias correction. One collective for lines and one for norms where the
    weights are sharded.
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
    """N, held back as a whole: its norm is that of up(N), the basis being orthonormal."""
    low = stacked(N)
    lengths = squares(low, -1).sum((-2, -1))
    layout = entries[0].layout
    if layout is not None:
        sum_([lengths], layout.own.split)
    return list(low / held_back(entries, lengths, limiter).to(low.dtype))


def held_back(entries: list[Entry], lengths: Tensor, limiter: NormGrowth) -> Tensor:
    """q [k, *, 1, 1] for entries, from squared lengths [k, *]; the limiter's states move."""
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
    if t.is_cpu and dim == -2:  # where torch's own take ten times as long
        rows = max(1, CACHED // max(1, t[..., :1, :].numel()))
        sums = [part.to(wide).square().sum(dim, keepdim=True) for part in t.split(rows, dim)]
        return (sums[0] if len(sums) == 1 else torch.stack(sums).sum(0)).sqrt()
    return torch.linalg.vector_norm(t, dim=dim, keepdim=True, dtype=wide)
