"""Rules for factor pairs: W = W0 + s B A is trained through B [m, r] and A [r, n], and what
matters is how W moves.

With G = dL/dW, which is never needed, the factors' gradients are gA = s B^T G and
gB = s G A^T; a change (hA, hB) of the factors moves W, to first order, by s (B hA + hB A).

Pairs of one shape are stacked, so that the r x r work of a whole model is a few batched
calls. All of it is done in fp64, which costs next to nothing at these sizes: (B^T B)^-1 can
be 1e8 where B has just left zero.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from eckart.optim.inner import Inner
from eckart.optim.part import Part, State
from eckart.optim.sharded import local, whole

if TYPE_CHECKING:
    from eckart.optim.bucket import Entry


Moments = dict[str, Tensor]


class Factor:
    """B or A of k pairs of one shape: value and gradient [k, *, a, b] in fp64.

    Whole where the parameters are sharded: adapters are small. A factor that rests has a
    gradient of zero.
    """

    def __init__(self, entries: list[Entry]):
        self.entries = entries
        self.value = torch.stack([whole(e.param.detach()) for e in entries]).double()
        grads = [whole(e.param.grad) for e in entries if e.param.grad is not None]
        self.rests = not grads  # pairs are stacked by whether there are any
        self.grad = torch.zeros_like(self.value) if self.rests else torch.stack(grads).double()

    def state(self, name: str) -> Tensor:
        """A state tensor of all of them, stacked, in fp64."""
        return torch.stack([e.tensors[name] for e in self.entries]).double()

    def keep(self, name: str, value: Tensor) -> None:
        """Write a stacked state tensor back."""
        for entry, v in zip(self.entries, value, strict=True):
            entry.tensors[name].copy_(v)

    @property
    def counts(self) -> list[int]:
        """How many steps each will have taken with this one."""
        return [e.state["step"] + 1 for e in self.entries]

    def corrections(self, beta: float) -> Tensor:
        """1 - beta^count of each, to divide what is stacked."""
        values = [1 - beta**t for t in self.counts]
        c = torch.tensor(values, dtype=self.value.dtype, device=self.value.device)
        return c.view(-1, *(1,) * (self.value.dim() - 1))

    def move(self, change: Tensor, decay: str = "before") -> None:
        """value -= lr change, with decoupled decay before or after; counts a step."""
        group = self.entries[0].group
        lr = float(group["lr"])
        keep = 1 - lr * group["weight_decay"]
        if decay == "before":
            self.value = keep * self.value - lr * change
        else:
            self.value = keep * (self.value - lr * change)
        for entry, v in zip(self.entries, self.value, strict=True):
            local(entry.param).copy_(local(entry.like_param(v)))
            entry.state["step"] += 1


@dataclass(frozen=True)
class PairRule(Part):
    """The contract of a rule for pairs. Factors without a partner follow the inner rule."""

    def init(self, B: Tensor, A: Tensor, inner: Inner) -> tuple[Moments, Moments]:
        """State tensors that B [*, m, r] and A [*, r, n] carry."""
        raise NotImplementedError

    def move(self, B: Factor, A: Factor, s: Tensor, inner: Inner) -> None:
        """Move k pairs. s [k, 1, .., 1] is the scale of each."""
        raise NotImplementedError

    @property
    def passes(self) -> int:
        """Gradients that one step needs, each after the last one's moves; `rests` counts them."""
        return 1

    def rests(self, step: int) -> str:
        """Which factor does not train at a step, counted from 0: "B", "A" or none, ""."""
        return ""

    def select(self, state: State, shape: torch.Size, axis: int, index: Tensor) -> State:
        """The state tensors of a factor of this shape of which the components `index` along
        `axis` live on: what is shaped like it is cut alike."""
        return {
            key: t.index_select(axis, index.to(t.device)) if t.shape == shape else t
            for key, t in state.items()
        }


class Pair(NamedTuple):
    """Two entries that are the factors of one matrix."""

    B: Entry
    A: Entry
    scale: float


def prepare(pairs: list[Pair], entries: Iterable[Entry]) -> None:
    """Make the state of pairs at their first step, and of entries that are in none."""
    for pair in pairs:
        rule = pair.B.rule.pair
        if rule is not None and not pair.B.tensors and not pair.A.tensors:
            B, A = (whole(e.param.detach()) for e in (pair.B, pair.A))
            made = rule.init(B, A, pair.B.rule.inner)
            for entry, state in zip((pair.B, pair.A), made, strict=True):
                entry.state.update(state)
                entry.tensors.update(state)
    paired = {e.name for pair in pairs for e in (pair.B, pair.A)}
    for entry in entries:
        if entry.name not in paired and not entry.tensors:
            state = entry.rule.inner.init(entry.param)
            entry.state.update(state)
            entry.tensors.update({k: local(t) for k, t in state.items()})


def move_pairs(pairs: Iterable[Pair]) -> None:
    """Move all pairs: those of one shape, and of the same groups, together."""
    alike: dict[tuple[object, ...], list[Pair]] = {}
    for pair in pairs:
        ends = (pair.B, pair.A)
        key = tuple((id(e.group), e.param.shape, e.param.device, e.rests) for e in ends)
        alike.setdefault(key, []).append(pair)
    for some in alike.values():
        rule = some[0].B.rule
        assert rule.pair is not None
        B, A = Factor([p.B for p in some]), Factor([p.A for p in some])
        s = torch.tensor([p.scale for p in some], dtype=B.value.dtype, device=B.value.device)
        rule.pair.move(B, A, s.view(-1, *(1,) * (B.value.dim() - 1)), rule.inner)


def stepped(factor: Factor, h: Tensor, inner: Inner) -> Tensor:
    """The inner rule's direction for one factor's gradients, element by element."""
    states = [e.tensors for e in factor.entries]
    direction = inner.step(list(h), states, factor.counts)
    pairs = zip(direction.tensors(), direction.correction, strict=True)
    return torch.stack([(n / c).to(h.dtype) for n, c in pairs])


class Spectrum(NamedTuple):
    """A symmetric matrix [*, r, r] with no negative eigenvalue, decomposed."""

    vectors: Tensor  # columns
    values: Tensor

    def inverse(self, damping: float, relative: bool = False) -> Tensor:
        """(C + damping I)^-1, or with damping relative to the mean eigenvalue; what would be
        divided by zero is zero."""
        shift = damping * self.values.mean(-1, keepdim=True) if relative else damping
        values = self.values + shift
        inverse = torch.where(values > 0, 1 / values, 0)
        return self.vectors * inverse.unsqueeze(-2) @ self.vectors.mT


def spectrum(C: Tensor) -> Spectrum:
    """The decomposition of C = F^T F; rounding below zero is zero."""
    values, vectors = torch.linalg.eigh(C)
    return Spectrum(vectors, values.clamp(min=0))


def sylvester(left: Spectrum, right: Spectrum, C: Tensor) -> Tensor:
    """X with L X + X R = C, for symmetric L and R; entries of C that neither reaches are
    left out."""
    Y = left.vectors.mT @ C @ right.vectors
    sums = left.values.unsqueeze(-1) + right.values.unsqueeze(-2)
    Y = torch.where(sums > 0, Y / sums, 0)
    return left.vectors @ Y @ right.vectors.mT
