"""Buckets: parameters of one group, rule, dtype and device, updated together.

Projected parameters in a bucket also share their shape, so that refreshes can be batched.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from eckart.decompose.products import CACHED
from eckart.optim.entry import Entry
from eckart.optim.inner import Direction
from eckart.optim.part import CHUNK, Tensors, counted, multiply_
from eckart.optim.project import Basis, add_up_, down
from eckart.optim.refresh import refresh
from eckart.optim.residual import limited
from eckart.optim.rule import Rule
from eckart.optim.sharded import local, sum_


@dataclass
class Bucket:
    """Entries with the same `Entry.key`; each method processes all of them at once."""

    entries: list[Entry]

    @property
    def rule(self) -> Rule:
        return self.entries[0].rule

    @property
    def low(self) -> Tensors:
        return [entry.R for entry in self.entries]

    def project(self) -> None:
        """Refresh the bases that are due, then set `low` to R = left^T A right^T, or to the
        gradient itself where the rule does not project."""
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
        """Compute R for the entries that have none yet.

        Bases that are not stored but generated from their state are generated in batches.
        """
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
        """The norm of each local gradient as applied (R where projected), times the square root
        of the group's `clip_weight`."""
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
        """Add gradients of full shape (from penalties), projected where the entry is."""
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
        """Update moments, weights and step counts of all entries but those named in `leave`."""
        self.entries = [e for e in self.entries if e.name not in leave]
        if not self.entries:
            return
        for part in self.parts():
            move(part)
            for entry in part:
                entry.state["step"] += 1

    def parts(self) -> Iterator[list[Entry]]:
        """The entries in chunks small enough for temporaries to fit in memory (in cache, on a
        CPU)."""
        most = CACHED if self.low[0].is_cpu else CHUNK
        piece: list[Entry] = []
        size = 0
        for entry in self.entries:
            # not the shard's size: processes with other chunks would deadlock in collectives
            elements = entry.R.numel() if entry.layout is None else entry.param.numel()
            if piece and size + elements > most:
                yield piece
                piece, size = [], 0
            piece.append(entry)
            size += elements
        yield piece


def move(entries: list[Entry]) -> None:
    """Run the inner rule on the entries and apply its direction to their weights."""
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
    """W -= lr N for unprojected entries, with decoupled decay before or after.

    With decay before, the result equals torch.optim's bit for bit.
    """
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
    """W -= lr scale up(N) for projected entries, decay included, in one product.

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


def buckets(entries: Iterator[Entry]) -> list[Bucket]:
    """The entries grouped by parameter group and key, in order of first appearance."""
    found: dict[tuple[Any, ...], Bucket] = {}
    for entry in entries:
        found.setdefault((id(entry.group), *entry.key()), Bucket([])).entries.append(entry)
    return list(found.values())


def clip_(moving: list[Bucket], bound: float) -> Tensor:
    """Clip the gradients as applied to a total norm of `bound`; returns the norm before.

    The norm is sqrt(sum over groups of clip_weight * squared norm), in fp32 at least, computed
    as torch.nn.utils.clip_grad_norm_ does; shards are summed with one collective per mesh.
    """
    if not moving:
        return torch.zeros(())
    device = moving[0].low[0].device
    norms: dict[Any, list[Tensor]] = defaultdict(list)
    for bucket in moving:
        layout = bucket.entries[0].layout
        norms[() if layout is None else layout.split].append(bucket.norms().to(device))
    for groups, found in norms.items():
        if groups:
            squares = torch.cat(found) ** 2
            sum_([squares], groups)
            norms[groups] = [squares.sqrt()]
    total = torch.linalg.vector_norm(torch.cat([n for found in norms.values() for n in found]))
    if bound != float("inf"):
        factor = (bound / (total + 1e-6)).clamp(max=1.0)
        for bucket in moving:
            bucket.scale_(factor)
    return total
