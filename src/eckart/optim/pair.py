"""Rules for factor pairs: W = W0 + s B A is trained through B [m, r] and A [r, n], and what
matters is how W moves.

With G = dL/dW, which is never needed, the factors' gradients are gA = s B^T G and
gB = s G A^T; a change (hA, hB) of the factors moves W, to first order, by s (B hA + hB A).

Pairs of one shape are stacked where they are small, so that a model's r x r work is a few
batched calls. That work is done in fp64: (B^T B)^-1 can be 1e8 where B has just left zero.
The thin products around it are in fp32, as the gradients are: what they round away is as
small as what the backward pass has rounded away from gA and gB.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from eckart.optim.inner import Inner
from eckart.optim.part import CACHED, CHUNK, Part, State
from eckart.optim.sharded import local, whole

if TYPE_CHECKING:
    from eckart.optim.bucket import Entry


Moments = dict[str, Tensor]


class Factor:
    """B or A of k pairs of one shape and age: value and gradient [k, *, a, b], fp32 at least.

    Whole where the parameters are sharded: adapters are small. A factor that rests has a
    gradient of zero. Of one pair all is a view, so what is changed in place is changed there.
    """

    def __init__(self, entries: list[Entry]):
        self.entries = entries
        self.value = stacked([whole(e.param.detach()) for e in entries])
        grads = [whole(e.param.grad) for e in entries if e.param.grad is not None]
        self.rests = not grads  # pairs are stacked by whether there are any
        self.grad = torch.zeros_like(self.value) if self.rests else stacked(grads)

    def state(self, name: str) -> Tensor:
        """A state tensor of all of them, stacked; `keep` it after changing it in place."""
        return stacked([e.tensors[name] for e in self.entries])

    def keep(self, **values: Tensor) -> None:
        """Write stacked state tensors back."""
        write(
            [e.tensors[name] for name in values for e in self.entries],
            [t for value in values.values() for t in value.unbind()],
        )

    @property
    def counts(self) -> list[int]:
        """How many steps each will have taken with this one."""
        return [e.state["step"] + 1 for e in self.entries]

    def correction(self, beta: float) -> float:
        """1 - beta^count, the same for all that are stacked."""
        return 1 - beta ** self.counts[0]

    def move(
        self, change: Tensor, size: float = 1.0, over: Tensor | None = None, decay: str = "before"
    ) -> None:
        """value -= lr size change (or change / over), with decoupled decay before or after;
        counts a step."""
        group = self.entries[0].group
        lr = float(group["lr"])
        keep = 1 - lr * group["weight_decay"]
        if keep != 1 and decay == "before":
            self.value.mul_(keep)
        if over is None:
            self.value.add_(change, alpha=-lr * size)
        else:
            self.value.addcdiv_(change, over, value=-lr * size)
        if keep != 1 and decay == "after":
            self.value.mul_(keep)
        rounded = self.value.to(self.entries[0].param.dtype).unbind()
        laid_out = [local(e.like_param(v)) for e, v in zip(self.entries, rounded, strict=True)]
        write([e.local for e in self.entries], laid_out)
        for entry in self.entries:
            entry.state["step"] += 1


def stacked(tensors: list[Tensor]) -> Tensor:
    """[k, ...] in fp32 at least: a view of one tensor, else a copy."""
    together = tensors[0].unsqueeze(0) if len(tensors) == 1 else torch.stack(tensors)
    return together.to(torch.promote_types(together.dtype, torch.float32))


def write(tensors: list[Tensor], values: Iterable[Tensor]) -> None:
    """Copy values into tensors, where they are not there already."""
    pairs = [(t, v) for t, v in zip(tensors, values, strict=True) if t.data_ptr() != v.data_ptr()]
    if pairs:
        torch._foreach_copy_([t for t, _ in pairs], [v for _, v in pairs])


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
    """Move all pairs: those of one shape, age and of the same groups together."""
    alike: dict[tuple[object, ...], list[Pair]] = {}
    for pair in pairs:
        ends = (pair.B, pair.A)
        key = tuple(
            (id(e.group), e.param.shape, e.param.device, e.rests, e.state["step"]) for e in ends
        )
        alike.setdefault(key, []).append(pair)
    for some in alike.values():
        for part in parts(some):
            rule = part[0].B.rule
            assert rule.pair is not None
            B, A = Factor([p.B for p in part]), Factor([p.A for p in part])
            s = column(tuple(p.scale for p in part), B.value.dim(), B.value.device)
            rule.pair.move(B, A, s, rule.inner)


@cache
def column(numbers: tuple[float, ...], dims: int, device: torch.device) -> Tensor:
    """k numbers as [k, 1, .., 1] in fp64: sent to the device once, not at every step."""
    return torch.tensor(numbers, dtype=torch.float64, device=device).view(-1, *(1,) * (dims - 1))


def parts(pairs: list[Pair]) -> Iterator[list[Pair]]:
    """Pairs of one shape in pieces that are worth stacking: on a CPU, large ones are not.

    There values, gradients and two state tensors should stay in the cache together.
    """
    B, A = pairs[0].B.param, pairs[0].A.param
    most = CACHED // 4 if B.is_cpu else CHUNK
    size = max(1, most // (B.numel() + A.numel()))
    yield from (pairs[i : i + size] for i in range(0, len(pairs), size))


def stepped(factor: Factor, h: Tensor, inner: Inner) -> Tensor:
    """The inner rule's direction for one factor's gradients, element by element."""
    states = [e.tensors for e in factor.entries]
    direction = inner.step(list(h), states, factor.counts)
    found = direction.tensors()
    if direction.correction[0] != 1:
        found = list(torch._foreach_div(found, direction.correction[0]))
    return stacked(found)


def grams(B: Tensor, A: Tensor) -> Tensor:
    """B^T B and A A^T [2, *, r, r] in fp64, so that both are decomposed at once."""
    return torch.stack([B.mT @ B, A @ A.mT]).double()


def along_rank(terms: Sequence[tuple[Tensor, Tensor]], flip: bool = False) -> Tensor:
    """sum Q X over pairs of Q [*, r, r], in any dtype, and X [*, r, n]; flipped, sum X Q^T of
    X [*, m, r]. Each product is added to the sum as it is made: no other tensor is as large."""
    total: Tensor | None = None
    for Q, X in terms:
        Q, X = Q.to(X.dtype).reshape(-1, *Q.shape[-2:]), X.reshape(-1, *X.shape[-2:])
        first, second = (X, Q.mT) if flip else (Q, X)
        total = torch.bmm(first, second) if total is None else total.baddbmm_(first, second)
    assert total is not None
    return total.view(terms[0][1].shape)


def inverse(C: Tensor, damping: float, relative: bool = False) -> Tensor:
    """(C + damping I)^-1 of Gram matrices C [*, r, r] in fp64, or with damping relative to the
    mean eigenvalue; what would be divided by zero is zero.

    By Cholesky, a fifth of the time of an eigendecomposition, which takes over where it fails.
    """
    shifted = C.clone()
    diagonal = shifted.diagonal(dim1=-2, dim2=-1)
    diagonal += damping * diagonal.mean(-1, keepdim=True) if relative else damping
    L, failed = torch.linalg.cholesky_ex(shifted)
    if failed.any():
        return spectrum(C).inverse(damping, relative)
    return torch.cholesky_inverse(L)


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
    """The decomposition of C = F^T F; rounding below zero is zero, and NaN stays NaN."""
    if not C.isfinite().all():
        return Spectrum(torch.full_like(C, torch.nan), torch.full_like(C[..., 0], torch.nan))
    values, vectors = torch.linalg.eigh(C)
    return Spectrum(vectors, values.clamp(min=0))


def sylvester(both: Spectrum, C: Tensor) -> Tensor:
    """X with L X + X R = C [*, r, r] for two symmetric matrices L and R, decomposed together
    [2, *, r, r]; entries of C that neither reaches are left out."""
    left, right = both.vectors.unbind()
    sums = both.values[0].unsqueeze(-1) + both.values[1].unsqueeze(-2)
    Y = left.mT @ C @ right
    Y = torch.where(sums > 0, Y / sums, 0)
    return left @ Y @ right.mT
