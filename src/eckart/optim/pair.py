"""Rules that update the two factors B [m, r] and A [r, n] of W = W0 + s B A together.

With G = dL/dW, which is never formed, the factors' gradients are gA = s B^T G and
gB = s G A^T; a change (hA, hB) of the factors changes W, to first order, by s (B hA + hB A).

A step consists of thin products over the long sides and of r x r work. The r x r work is one
batch for all pairs of a rank, in fp64, since (B^T B)^-1 can be 1e8 where B has just left zero.
The thin products are in fp32, as the gradients are: their rounding error is no larger than
that of gA and gB.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from eckart.decompose.products import CACHED, add_product_, product
from eckart.optim.inner import Inner
from eckart.optim.part import CHUNK, Part, Tensors
from eckart.optim.sharded import local, whole

if TYPE_CHECKING:
    from eckart.optim.entry import Entry


Moments = dict[str, Tensor]


class Stacks(NamedTuple):
    """The B (`tall`, [m, r]) or A ([r, n]) of K pairs of one rank; those of one shape may be one
    stacked tensor [k, m, r] or [k, r, n]."""

    tensors: Tensors
    tall: bool

    def across(self, other: Stacks, mean: bool = False) -> Tensor:
        """B^T B' or A A'^T of each pair, [K, r, r] fp64; with `mean` divided by the length of the
        long side."""
        found = []
        for X, Y in zip(self.tensors, other.tensors, strict=True):
            inner = product(X.mT, Y) if self.tall else product(X, Y.mT)
            found.append(inner / X.shape[-2 if self.tall else -1] if mean else inner)
        r = found[0].shape[-1]
        return torch.cat([inner.flatten(0, -2) for inner in found]).view(-1, r, r).double()

    def cut(self, numbers: Tensor) -> Tensors:
        """Split numbers [K, a, b] into one piece per stacked tensor."""
        pieces = numbers.split([t.shape[:-2].numel() for t in self.tensors])
        pairs = zip(pieces, self.tensors, strict=True)
        return [piece.view(*t.shape[:-2], *piece.shape[-2:]) for piece, t in pairs]

    def double(self) -> Stacks:
        return Stacks([t.double() for t in self.tensors], self.tall)

    def clone(self) -> Stacks:
        return Stacks([t.clone() for t in self.tensors], self.tall)


def mixed(*terms: tuple[Tensor, Stacks]) -> Stacks:
    """The sum over terms (Q, X) of Q X for factors A, of X Q^T for factors B.

    Q [K, r, r] in any dtype. Products are added in place, so no second tensor of X's size is
    needed beside the sum.
    """
    tall, dtype = terms[0][1].tall, terms[0][1].tensors[0].dtype
    totals: Tensors = []
    for Q, stacks in terms:
        parts = stacks.cut((Q.mT if tall else Q).to(dtype))
        for i, (q, X) in enumerate(zip(parts, stacks.tensors, strict=True)):
            first, second = (X, q) if tall else (q, X)
            if i == len(totals):
                totals.append(product(first, second))
            else:
                add_product_(totals[i], first, second)
    return Stacks(totals, tall)


class Factor:
    """The B, or the A, of pairs of one rank and step count: values and gradients, fp32 at least.

    Sharded parameters are gathered, since adapters are small. Leading dimensions (experts)
    count as pairs. A frozen factor has a gradient of zero. A stack of one pair is a view of the
    parameter, so changing it in place changes the parameter.
    """

    def __init__(self, stacks: list[list[Entry]], tall: bool):
        self.stacks, self.tall = stacks, tall
        self.entries = [e for stack in stacks for e in stack]
        self.value = self.stacked([whole(e.param.detach()) for e in self.entries])
        self.rests = self.entries[0].rests  # the same for all: see `move_pairs`
        if self.rests:
            self.grad = Stacks([torch.zeros_like(t) for t in self.value.tensors], tall)
        else:
            self.grad = self.stacked([whole(e.gradient) for e in self.entries])

    def stacked(self, tensors: Tensors) -> Stacks:
        """One tensor per entry [*, a, b], stacked as the entries are, in fp32 at least."""
        waiting, found = iter(tensors), []
        wide = torch.promote_types(tensors[0].dtype, torch.float32)
        for stack in self.stacks:
            some = [next(waiting) for _ in stack]
            together = some[0] if len(some) == 1 else torch.stack(some)
            together = together.flatten(0, -3) if together.dim() > 3 else together
            found.append(together.to(wide))
        return Stacks(found, self.tall)

    def state(self, name: str) -> Stacks:
        """A state tensor shaped like the factor; call `keep` after changing it in place."""
        return self.stacked([e.tensors[name] for e in self.entries])

    def small(self, name: str, dims: int = 2) -> Tensor:
        """A state tensor [K, ...] with `dims` dimensions per pair, such as r x r."""
        found = [e.tensors[name] for e in self.entries]
        return torch.cat([t.reshape(-1, *t.shape[t.dim() - dims :]) for t in found])

    def keep(self, **values: Stacks | Tensor) -> None:
        """Write state tensors back."""
        for name, value in values.items():
            states = [e.tensors[name] for e in self.entries]
            if isinstance(value, Tensor):
                write(states, list(value.chunk(len(states))))
            else:
                write(states, self.pieces(value))

    def pieces(self, stacks: Stacks) -> Tensors:
        """One tensor for each entry, [*, a, b]: views."""
        found: Tensors = []
        for t, stack in zip(stacks.tensors, self.stacks, strict=True):
            lead = stack[0].param.shape[:-2]
            alone = t.shape[:-2] == lead
            found += [t] if alone else t.view(len(stack), *lead, *t.shape[-2:]).unbind()
        return found

    @property
    def counts(self) -> list[int]:
        """The step count of each entry, this step included."""
        return [e.state["step"] + 1 for e in self.entries]

    def correction(self, beta: float) -> float:
        """The bias correction 1 - beta^count, the same for all pairs."""
        return 1 - beta ** self.counts[0]

    def move(
        self, change: Stacks, size: float = 1.0, over: Tensors | None = None, decay: str = "before"
    ) -> None:
        """value -= lr size change (or change / over), with decoupled decay before or after, and
        count the step."""
        group, values = self.entries[0].group, self.value.tensors
        lr = float(group["lr"])
        keep = 1 - lr * group["weight_decay"]
        if keep != 1 and decay == "before":
            torch._foreach_mul_(values, keep)
        if over is None:
            torch._foreach_add_(values, change.tensors, alpha=-lr * size)
        else:
            torch._foreach_addcdiv_(values, change.tensors, over, -lr * size)
        if keep != 1 and decay == "after":
            torch._foreach_mul_(values, keep)
        params, laid_out = [], []
        for entry, value in zip(self.entries, self.pieces(self.value), strict=True):
            entry.state["step"] += 1
            if entry.layout is not None or value.data_ptr() != entry.param.data_ptr():
                params.append(entry.local)
                laid_out.append(local(entry.like_param(value)))
        write(params, laid_out)


def write(tensors: Tensors, values: Tensors) -> None:
    """Copy values into tensors, except where a value is a view of its tensor."""
    pairs = [(t, v) for t, v in zip(tensors, values, strict=True) if t.data_ptr() != v.data_ptr()]
    if pairs:
        torch._foreach_copy_([t for t, _ in pairs], [v.view(t.shape) for t, v in pairs])


@dataclass(frozen=True)
class PairRule(Part):
    """Interface of a rule for pairs. Factors without a partner follow the inner rule."""

    def init(self, B: Tensor, A: Tensor, inner: Inner) -> tuple[Moments, Moments]:
        """The initial state tensors of B [*, m, r] and of A [*, r, n]."""
        raise NotImplementedError

    def move(self, B: Factor, A: Factor, s: Tensor, inner: Inner) -> None:
        """Update K pairs of one rank and step count. s [K, 1, 1] is the scale of each."""
        raise NotImplementedError

    @property
    def passes(self) -> int:
        """Gradients that one step needs, each computed after the previous pass's update. `rests`
        counts passes."""
        return 1

    def rests(self, step: int) -> str:
        """The factor that is frozen at `step` (counted from 0): "B", "A", or "" for neither."""
        return ""


class Pair(NamedTuple):
    """The entries of the two factors of one matrix, and its scale s."""

    B: Entry
    A: Entry
    scale: float


def prepare(pairs: list[Pair], entries: Iterable[Entry]) -> None:
    """Initialise the state of new pairs, and of entries that are in no pair."""
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
    """Update all pairs; those of the same rank, step counts and groups in one batch."""
    alike: dict[tuple[object, ...], list[Pair]] = {}
    for pair in pairs:
        ends = (pair.B, pair.A)
        key = tuple(
            (id(e.group), e.param.dtype, e.param.device, e.rests, e.state["step"]) for e in ends
        )
        alike.setdefault((pair.B.param.shape[-1], *key), []).append(pair)
    for some in alike.values():
        for stacks in batches(some):
            rule = stacks[0][0].B.rule
            assert rule.pair is not None
            B = Factor([[p.B for p in stack] for stack in stacks], tall=True)
            A = Factor([[p.A for p in stack] for stack in stacks], tall=False)
            scales = (p.scale for stack in stacks for p in stack for _ in range(matrices(p)))
            rule.pair.move(B, A, column(tuple(scales), B.entries[0].param.device), rule.inner)


def matrices(pair: Pair) -> int:
    """The number of matrices (experts) in one pair."""
    return pair.B.param.shape[:-2].numel()


@cache
def column(numbers: tuple[float, ...], device: torch.device) -> Tensor:
    """K numbers as [K, 1, 1] fp64; cached, so that they are sent to the device once."""
    return torch.tensor(numbers, dtype=torch.float64, device=device).view(-1, 1, 1)


def batches(pairs: list[Pair]) -> Iterator[list[list[Pair]]]:
    """Batches of stacks of pairs of one shape, sized so that temporaries fit in memory or, on a
    CPU, in cache. On a CPU only tiny factors are stacked, as a copy costs as much as a product.
    """
    cpu = pairs[0].B.param.is_cpu
    most, to_stack = (2 * CACHED, CACHED // 64) if cpu else (CHUNK, CHUNK)
    shapes: dict[tuple[torch.Size, ...], list[Pair]] = {}
    for pair in pairs:
        shapes.setdefault((pair.B.param.shape, pair.A.param.shape), []).append(pair)
    size, batch = 0, list[list[Pair]]()
    for (B, A), some in shapes.items():
        elements = B.numel() + A.numel()
        together = max(1, to_stack // elements)
        for start in range(0, len(some), together):
            stack = some[start : start + together]
            if batch and size + elements * len(stack) > most:
                yield batch
                size, batch = 0, []
            batch.append(stack)
            size += elements * len(stack)
    yield batch


def stepped(factor: Factor, h: Stacks, inner: Inner) -> tuple[Stacks, float]:
    """The inner rule's direction for gradients h of one factor, and the number by which it has
    yet to be multiplied (the bias correction)."""
    states = [e.tensors for e in factor.entries]
    direction = inner.step(factor.pieces(h), states, factor.counts, fused=True)
    return factor.stacked(direction.tensors()), 1 / direction.correction[0]


def grams(B: Stacks, A: Stacks) -> Tensor:
    """B^T B and A A^T [2, K, r, r] in fp64, so that both are decomposed at once."""
    return torch.stack([B.across(B), A.across(A)])


def inverse(C: Tensor, damping: float, relative: bool = False) -> Tensor:
    """(C + damping I)^-1 of Gram matrices C [*, r, r] in fp64; `relative` damping is multiplied
    by the mean eigenvalue. A pseudoinverse where there is no damping, zero where C is.

    By Cholesky: a fifth of the time of an eigendecomposition, and no host sync. It cannot fail,
    as the damping is raised to at least rounding error.
    """
    if not damping:
        return spectrum(C).inverse(damping)
    r = C.shape[-1]
    trace = C.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]
    eye = torch.eye(r, dtype=C.dtype, device=C.device)
    shift = (trace * (r * torch.finfo(C.dtype).eps)).clamp(min=0.0 if relative else damping)
    if relative:
        none = trace == 0  # nothing to invert, and no size to damp by
        shift = torch.where(none, 1, shift.maximum(trace * (damping / r)))
    L = torch.linalg.cholesky_ex(torch.addcmul(C, eye, shift))[0]
    root = torch.linalg.solve_triangular(L, eye.expand_as(C), upper=False)
    found = root.mT @ root
    return torch.where(none, 0, found) if relative else found


class Spectrum(NamedTuple):
    """The eigendecomposition of a positive semidefinite matrix [*, r, r]."""

    vectors: Tensor  # columns
    values: Tensor

    def inverse(self, damping: float, relative: bool = False) -> Tensor:
        """(C + damping I)^-1; `relative` damping is multiplied by the mean eigenvalue. Zero
        eigenvalues are left out, as in a pseudoinverse."""
        shift = damping * self.values.mean(-1, keepdim=True) if relative else damping
        values = self.values + shift
        inverse = torch.where(values > 0, 1 / values, 0)
        return self.vectors * inverse.unsqueeze(-2) @ self.vectors.mT


def spectrum(C: Tensor) -> Spectrum:
    """The eigendecomposition of C = F^T F; negative rounding errors become 0, NaN stays NaN."""
    ok = C.isfinite().all(-1).all(-1)[..., None]
    values, vectors = torch.linalg.eigh(torch.where(ok[..., None], C, 0))
    return Spectrum(vectors, torch.where(ok, values.clamp(min=0), torch.nan))


def sylvester(both: Spectrum, C: Tensor) -> Tensor:
    """X with L X + X R = C [*, r, r], for the spectrum of L and R stacked [2, *, r, r].

    Components of C on which both L and R have eigenvalue 0 are ignored.
    """
    left, right = both.vectors.unbind()
    sums = both.values[0].unsqueeze(-1) + both.values[1].unsqueeze(-2)
    Y = left.mT @ C @ right
    Y = torch.where(sums > 0, Y / sums, 0)
    return left @ Y @ right.mT
