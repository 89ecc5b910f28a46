"""What a step moves together: parameters of one group, one rule, one dtype and device.

Where they are projected they also share their shape, so that refreshes can be batched.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any
from zlib import crc32

import torch
from torch import Tensor

from eckart.decompose.products import CACHED
from eckart.errors import UsageError
from eckart.optim.inner import Direction
from eckart.optim.part import CHUNK, State, Tensors, counted, multiply_
from eckart.optim.project import Basis, Chosen, Directions, add_up_, as_matrix, down
from eckart.optim.refresh import refresh
from eckart.optim.residual import limited
from eckart.optim.rule import Rule
from eckart.optim.sharded import Kind, Layout, is_sharded, local, sum_
from eckart.optim.storage import rounded_by_chance


@dataclass
class Entry:
    """One parameter as a step sees it: local, and a matrix [*, m, n] where it is projected."""

    name: str
    param: Tensor
    group: Mapping[str, Any]
    rule: Rule  # the one that a parameter of this shape really follows
    layout: Layout | None  # None where the parameter is whole on this process
    state: State  # as saved: numbers and tensors, DTensors where the parameter is one
    tensors: dict[str, Tensor]  # the state's tensors, local
    base_seed: int = 0
    fed: Tensor | None = None  # A, where the rule has a source
    found: Basis | None = None  # the basis, where it lives for this step alone
    low: Tensor | None = None  # the gradient as applied: R once projected, else G
    summed: bool = False  # is R already that of all shards?

    @property
    def projected(self) -> bool:
        return not self.rule.projector.identity

    @property
    def basis(self) -> Directions:
        if self.found is not None:
            return self.found
        projector = self.rule.projector
        basis = projector.basis(self.tensors, self.local, self.size)
        if self.layout is None or not projector.derived or isinstance(basis, Chosen):
            return basis
        kinds: tuple[Kind, Kind] = ("left", "right")  # derived whole; this process has a part
        parts = zip(basis, kinds, strict=True)
        layout = self.layout.own
        return Basis(*(None if t is None else local(layout.place(t, k)) for t, k in parts))

    @property
    def A(self) -> Tensor:
        """What is projected: the gradient, or what the rule's source makes of it."""
        return self.view(self.gradient) if self.fed is None else self.fed

    @property
    def sought(self) -> Tensor:
        """What a basis is found from."""
        return self.A if self.rule.source is None else self.rule.source.sought(self, self.A)

    @property
    def whole_sought(self) -> Tensor:
        """The same with all rows and columns, gathered where they are sharded."""
        if self.layout is None:
            return self.sought
        leading, part = self.group["leading"], self.sought.reshape(self.local.shape)
        shape = torch.Size([*part.shape[:leading], *self.param.shape[leading:]])
        return as_matrix(self.layout.own.gather(part, shape), leading)

    @property
    def first_matrix(self) -> int:
        """The number of this process's first matrix among all of the parameter."""
        if self.layout is None or self.layout.own is self.layout:
            return 0
        numbers = torch.arange(self.param.shape[0], device=self.local.device)
        return int(next(iter(local(self.layout.place(numbers, "small"))), 0))

    @property
    def size(self) -> tuple[int, int]:
        """m and n of the whole matrix."""
        leading = self.group["leading"]
        return self.param.shape[leading], prod(self.param.shape[leading + 1 :])

    @property
    def low_shape(self) -> torch.Size:
        """The shape of the whole of R, or of G where nothing is projected."""
        if not self.projected:
            return self.param.shape
        W = torch.empty(*self.param.shape[: self.group["leading"]], *self.size, device="meta")
        return self.rule.projector.low(W).shape

    @property
    def local(self) -> Tensor:
        """The parameter on this process."""
        return local(self.param)

    @property
    def rests(self) -> bool:
        """Has it no gradient at this step?"""
        return self.param.grad is None

    @property
    def seed(self) -> int:
        """For what is drawn at this step: from the name, so that order does not matter."""
        return crc32(f"{self.base_seed}/{self.name}/{self.state['step']}".encode())

    @property
    def R(self) -> Tensor:
        assert self.low is not None, "projected, or kept, before it is used"
        return self.low

    @property
    def gradient(self) -> Tensor:
        """The parameter's gradient, as torch left it."""
        assert self.param.grad is not None
        return self.param.grad

    def view(self, t: Tensor) -> Tensor:
        """A tensor like the parameter, seen as the weight is: local, a matrix if projected."""
        t = local(t)
        return as_matrix(t, self.group["leading"]) if self.projected else t

    @property
    def by_chance(self) -> bool:
        """Is the weight rounded by chance when it is written?"""
        return self.rule.rounding == "stochastic" and self.param.dtype == torch.bfloat16

    @property
    def weight(self) -> Tensor:
        """The weight as a step moves it, seen as `view` sees it: the parameter's own memory
        where strides allow; in fp32 where it will be rounded by chance."""
        W = self.view(self.param)
        return W.float() if self.by_chance else W

    def write(self, W: Tensor) -> None:
        """Put a moved `weight` back where it is not the parameter's own memory.

        Chance is a function of name, step and this process's place among the shards: copies
        of a parameter stay equal, and a resumed run draws the same.
        """
        if self.by_chance:
            shard = 0 if self.layout is None else self.layout.shard
            W = rounded_by_chance(W, crc32(f"{self.seed}/rounding/{shard}".encode()))
        if W.data_ptr() != self.local.data_ptr():
            self.local.copy_(W.view_as(self.local))

    def lower(self, A: Tensor) -> Tensor:
        """left^T A right^T: only this process's part of the sum where such a side is sharded."""
        return down(A, self.basis)

    def like_param(self, t: Tensor) -> Tensor:
        """A tensor in the parameter's dtype, laid out as the parameter is if it is whole."""
        t = t.to(self.param.dtype)
        return t if self.layout is None or is_sharded(t) else self.layout.place(t, "param")

    def key(self) -> tuple[Any, ...]:
        """Entries with one key are moved together."""
        shape = self.param.shape if self.projected else None
        return (self.rule, self.param.dtype, self.param.device, shape, self.layout)


@dataclass
class Bucket:
    """Entries of one key: the maths below runs over all of them at once."""

    entries: list[Entry]

    @property
    def rule(self) -> Rule:
        return self.entries[0].rule

    @property
    def low(self) -> Tensors:
        return [entry.R for entry in self.entries]

    def project(self) -> None:
        """Refresh the bases that are due, then R = left^T A right^T; G where none is."""
        source = self.rule.source
        if not self.entries[0].projected:
            for entry in self.entries:
                entry.low = local(entry.gradient)
            return
        if source is not None:
            for entry in self.entries:
                entry.fed = source.receive(entry)
        refresh(self.entries)
        self.lower()
        layout = self.entries[0].layout
        if layout is not None:
            sum_([e.R for e in self.entries if not e.summed], layout.partial)
        if source is not None:
            for entry in self.entries:
                source.settle(entry, entry.A)

    def lower(self) -> None:
        """R of all that have none yet. Bases that are drawn anew are so for many at once."""
        waiting = [e for e in self.entries if e.low is None]
        projector, first = self.rule.projector, self.entries[0]
        if projector.orthonormal or not projector.derived or first.layout is not None:
            for entry in waiting:
                entry.low = entry.lower(entry.A)
            return
        elements = sum(a * b for a, b in zip(projector.ranks(*first.size), first.size, strict=True))
        together = max(1, (CACHED if first.local.is_cpu else CHUNK) // elements)
        for start in range(0, len(waiting), together):
            some = waiting[start : start + together]
            state = {n: torch.stack([e.tensors[n] for e in some]) for n in projector.names}
            bases = projector.basis(state, first.local, first.size)
            assert isinstance(bases, Basis)
            for i, entry in enumerate(some):
                entry.low = down(entry.A, Basis(*(None if t is None else t[i] for t in bases)))

    def norms(self) -> Tensor:
        """The norm of each local gradient as applied, times the root of its group's weight."""
        wide = torch.promote_types(self.low[0].dtype, torch.float32)
        norms = torch.stack(torch._foreach_norm(self.low, 2, dtype=wide))
        weight = self.entries[0].group["clip_weight"]
        return norms if weight == 1 else norms * weight**0.5

    def scale_(self, factor: Tensor) -> None:
        """Multiply the gradients as applied by a 0-dim tensor."""
        tensors = self.low
        if self.rule.residual is not None:
            tensors = tensors + [local(e.gradient) for e in self.entries]
        torch._foreach_mul_(tensors, factor.to(tensors[0].device))

    def add(self, gradients: Mapping[Tensor, Tensor]) -> None:
        """Add gradients of full shape to those as applied."""
        found = [e for e in self.entries if e.param in gradients]
        extra = []
        for e in found:
            g = e.like_param(gradients[e.param])
            if self.rule.residual is not None:
                e.gradient.add_(g)
            extra.append(e.lower(e.view(g)) if e.projected else local(g))
        layout = self.entries[0].layout
        if layout is not None:
            sum_(extra, layout.partial)
        for entry, low in zip(found, extra, strict=True):
            entry.R.add_(low)

    def apply(self, leave: Container[str] = ()) -> None:
        """Move the moments and the weights, then count the step; leave some out by name."""
        self.entries = [e for e in self.entries if e.name not in leave]
        if not self.entries:
            return
        for part in self.parts():
            move(part)
            for entry in part:
                entry.state["step"] += 1

    def parts(self) -> Iterator[list[Entry]]:
        """The entries in pieces, so that temporaries stay small (and, on a CPU, cached)."""
        most = CACHED if self.low[0].is_cpu else CHUNK
        piece: list[Entry] = []
        size = 0
        for entry in self.entries:
            # a shard's own size would part differently, and so wait, on each process
            elements = entry.R.numel() if entry.layout is None else entry.param.numel()
            if piece and size + elements > most:
                yield piece
                piece, size = [], 0
            piece.append(entry)
            size += elements
        yield piece


def move(entries: list[Entry]) -> None:
    """Move the moments, and the weights in the direction that comes of it."""
    rule, group = entries[0].rule, entries[0].group
    R, states = [e.R for e in entries], [e.tensors for e in entries]
    counts = [counted(e.state) + 1 for e in entries]
    layout = entries[0].layout
    if layout is not None and rule.inner.sums:
        shapes = [e.low_shape for e in entries]
        direction = rule.inner.step_on_shards(R, states, counts, shapes, layout.split_of_low)
    else:
        direction = rule.inner.step(R, states, counts, fused=entries[0].projected)
    lr, keep = float(group["lr"]), 1.0
    if group["weight_decay"]:
        keep = 1 - lr * group["weight_decay"]
    if entries[0].projected:
        move_back(entries, direction, lr, keep)
    else:
        move_plain(entries, direction, lr, keep)


def move_plain(entries: list[Entry], direction: Direction, lr: float, keep: float) -> None:
    """W -= lr N, with decoupled decay before or after; before, in the bits of torch.optim."""
    rule, W = entries[0].rule, [e.weight for e in entries]
    sizes = [lr / c for c in direction.correction]
    if keep != 1 and rule.decay == "before":
        multiply_(W, keep)
    if direction.denominator is not None and W[0].dtype == direction.numerator[0].dtype:
        steps = [-size for size in sizes]
        torch._foreach_addcdiv_(W, direction.numerator, direction.denominator, steps)
    else:
        for w, N, size in zip(W, direction.tensors(), sizes, strict=True):
            w.add_(N, alpha=-size)
    if keep != 1 and rule.decay == "after":
        multiply_(W, keep)
    if entries[0].by_chance:
        for entry, w in zip(entries, W, strict=True):
            entry.write(w)


def move_back(entries: list[Entry], direction: Direction, lr: float, keep: float) -> None:
    """W -= lr scale N, projected back: one product does decay, projection and update.

    Decay after the update is keep (W - u): the same product with a smaller step.
    """
    rule = entries[0].rule
    rate = lr if rule.decay == "before" else lr * keep
    if rule.residual is not None:
        rule.residual.move(entries, direction, rate, keep)
        return
    N = direction.tensors()
    if rule.limiter is not None:
        N = limited(entries, N, rule.limiter)
    for entry, n, c in zip(entries, N, direction.correction, strict=True):
        W = entry.weight
        size = rate * rule.size_of_step(*entry.size) / c
        add_up_(W, n, entry.basis, alpha=-size, beta=keep)
        entry.write(W)


def entry_of(name: str, p: Tensor, group: Mapping[str, Any], state: State, seed: int = 0) -> Entry:
    """A parameter with its state, which is made where it is empty."""
    rule, leading = group["rule"].on(p.shape, group["leading"]), group["leading"]
    if p.grad is not None and p.grad.is_sparse:
        raise UsageError(
            "sparse gradients are not supported",
            [(name, "sparse gradient")],
            "Build the embedding with sparse=False.",
        )
    layout = rule.layout(name, p, leading)
    if layout is not None:
        check_sharded(name, rule, layout)
    if not state:
        state.update(rule.start(p, leading, layout))
    tensors = {k: local(v) for k, v in state.items() if isinstance(v, Tensor)}
    return Entry(name, p, group, rule, layout, state, tensors, seed)


def check_sharded(name: str, rule: Rule, layout: Layout) -> None:
    """Raise UsageError where a part of the rule cannot work with this split."""
    inner, source = rule.inner, rule.source
    fits = inner.elementwise or inner.sums or (inner.lines and layout.dims_of_low <= {0})
    if not fits:
        raise UsageError(
            "this inner rule needs whole tensors, and the parameter is sharded",
            [(name, type(inner).__name__)],
            "Train without sharding, or use Adam.",
        )
    if layout.groups(*rule.projector.unsplit()):
        raise UsageError(
            "these coordinates cannot be drawn from a part of the parameter",
            [(name, " and ".join(rule.projector.unsplit()) + " are sharded")],
            "Take columns where parameters are sharded along their outputs (dimension 0).",
        )
    if source is not None and source.lines and layout.groups("columns"):
        raise UsageError(
            "what a step leaves over is stored by whole rows, and the parameter's are sharded",
            [(name, type(source).__name__)],
            "Store it in 32 bits, or shard the parameter along its outputs (dimension 0).",
        )


def buckets(entries: Iterator[Entry]) -> list[Bucket]:
    """Entries sorted by group and key, in the order of the first of each."""
    found: dict[tuple[Any, ...], Bucket] = {}
    for entry in entries:
        found.setdefault((id(entry.group), *entry.key()), Bucket([])).entries.append(entry)
    return list(found.values())
