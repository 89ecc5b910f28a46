"""Entry: a parameter with the rule, state and gradient that one optimizer step uses."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any
from zlib import crc32

import torch
from torch import Tensor

from eckart.errors import UsageError
from eckart.optim.part import State
from eckart.optim.project import Basis, Chosen, Directions, as_matrix, down
from eckart.optim.rule import Rule
from eckart.optim.sharded import Kind, Layout, is_sharded, local, sum_
from eckart.optim.storage import rounded_by_chance


@dataclass
class Entry:
    """One parameter during one step: its local tensors, viewed as [*, m, n] if projected."""

    name: str
    param: Tensor
    group: Mapping[str, Any]
    rule: Rule  # `Rule.on` this shape: the group's rule, or its `plain` one
    layout: Layout | None  # None where the parameter is whole on this process
    state: State  # as saved: numbers and tensors, DTensors where the parameter is one
    tensors: dict[str, Tensor]  # the state's tensors, local
    base_seed: int = 0
    fed: Tensor | None = None  # A, where the rule has a source
    found: Basis | None = None  # the basis, where it is used for this step only and not stored
    low: Tensor | None = None  # the gradient as applied: R once projected, else G
    summed: bool = False  # True where R is already summed over all shards

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
        kinds: tuple[Kind, Kind] = ("left", "right")  # generated whole, then cut to this shard
        parts = zip(basis, kinds, strict=True)
        layout = self.layout.own
        return Basis(*(None if t is None else local(layout.place(t, k)) for t, k in parts))

    @property
    def A(self) -> Tensor:
        """The matrix that is projected: the gradient, or the output of the rule's source."""
        return self.view(self.gradient) if self.fed is None else self.fed

    @property
    def sought(self) -> Tensor:
        """The matrix that a new basis is computed from."""
        return self.A if self.rule.source is None else self.rule.source.sought(self, self.A)

    @property
    def whole_sought(self) -> Tensor:
        """`sought` with all rows and columns, gathered where they are sharded."""
        if self.layout is None:
            return self.sought
        leading, part = self.group["leading"], self.sought.reshape(self.local.shape)
        shape = torch.Size([*part.shape[:leading], *self.param.shape[leading:]])
        return as_matrix(self.layout.own.gather(part, shape), leading)

    @property
    def first_matrix(self) -> int:
        """The index of this process's first matrix (expert) among all of the parameter's."""
        if self.layout is None or self.layout.own is self.layout:
            return 0
        numbers = torch.arange(self.param.shape[0], device=self.local.device)
        return int(next(iter(local(self.layout.place(numbers, "small"))), 0))

    @property
    def size(self) -> tuple[int, int]:
        """m and n of the whole (unsharded) matrix."""
        leading = self.group["leading"]
        return self.param.shape[leading], prod(self.param.shape[leading + 1 :])

    @property
    def low_shape(self) -> torch.Size:
        """The unsharded shape of R, or of G where nothing is projected."""
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
        """True where the parameter has no gradient at this step."""
        return self.param.grad is None

    @property
    def seed(self) -> int:
        """The seed for random draws at this step; from the name, so that order does not matter."""
        return crc32(f"{self.base_seed}/{self.name}/{self.state['step']}".encode())

    @property
    def R(self) -> Tensor:
        assert self.low is not None, "projected, or kept, before it is used"
        return self.low

    @property
    def gradient(self) -> Tensor:
        """The parameter's `.grad`, unchanged."""
        assert self.param.grad is not None
        return self.param.grad

    def view(self, t: Tensor) -> Tensor:
        """The local part of a tensor shaped like the parameter, as [*, m, n] if projected."""
        t = local(t)
        return as_matrix(t, self.group["leading"]) if self.projected else t

    @property
    def by_chance(self) -> bool:
        """True where the weight is rounded stochastically when written."""
        return self.rule.rounding == "stochastic" and self.param.dtype == torch.bfloat16

    @property
    def weight(self) -> Tensor:
        """The weight to update, shaped as by `view`: a view of the parameter where strides
        allow; an fp32 copy where it will be rounded stochastically."""
        W = self.view(self.param)
        return W.float() if self.by_chance else W

    def write(self, W: Tensor) -> None:
        """Copy an updated `weight` back into the parameter, unless it is a view of it.

        The seed of stochastic rounding depends on name, step and shard index: replicas of a
        parameter stay equal, and a resumed run draws the same.
        """
        if self.by_chance:
            shard = 0 if self.layout is None else self.layout.shard
            W = rounded_by_chance(W, crc32(f"{self.seed}/rounding/{shard}".encode()))
        if W.data_ptr() != self.local.data_ptr():
            self.local.copy_(W.view_as(self.local))

    def lower(self, A: Tensor) -> Tensor:
        """left^T A right^T; a partial sum where a projected side is sharded."""
        return down(A, self.basis)

    def like_param(self, t: Tensor) -> Tensor:
        """A tensor cast to the parameter's dtype and, if it is whole, sharded as the parameter."""
        t = t.to(self.param.dtype)
        return t if self.layout is None or is_sharded(t) else self.layout.place(t, "param")

    def key(self) -> tuple[Any, ...]:
        """The key of the entry's bucket: entries with equal keys are updated together."""
        shape = self.param.shape if self.projected else None
        return (self.rule, self.param.dtype, self.param.device, shape, self.layout)


def entry_of(name: str, p: Tensor, group: Mapping[str, Any], state: State, seed: int = 0) -> Entry:
    """The entry of a parameter; fills `state` if it is empty. Raises UsageError for a sparse
    gradient or a rule that cannot work with the parameter's sharding."""
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
            "error feedback is stored by whole rows, and the parameter's are sharded",
            [(name, type(source).__name__)],
            "Store it in 32 bits, or shard the parameter along its outputs (dimension 0).",
        )


def spoilt(entries: list[Entry]) -> bool:
    """True where any gradient on any process is not finite. One host sync."""
    if not entries:
        return False
    found = [local(e.gradient) if e.low is None else e.low for e in entries]
    bad = torch.stack([t.isfinite().all().logical_not().to(found[0].device) for t in found])
    total = bad.any().float()
    groups = dict.fromkeys(g for e in entries if e.layout is not None for g in e.layout.every)
    sum_([total], tuple(groups))
    return bool(total)
