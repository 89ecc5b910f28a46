"""A bucket: parameters of one group that a step moves together.

They follow one rule and share dtype and device; where they are projected, also their
shape, so that their refreshes can be batched. Everything is a list with one entry per
parameter.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from eckart.errors import UsageError
from eckart.optim.part import CHUNK, State, Tensors, multiply_
from eckart.optim.project import Basis, add_up_, down
from eckart.optim.refresh import counted
from eckart.optim.rule import Rule, as_matrix


@dataclass
class Bucket:
    """Parameters with a gradient, as the rule sees them: matrices, or tensors of any shape
    where nothing is projected."""

    rule: Rule
    group: Mapping[str, Any]
    names: list[str]
    params: Tensors
    weights: Tensors  # views of the parameters
    grads: Tensors  # views of their gradients
    states: list[State]
    low: Tensors  # the gradients as applied: R, once projected; G itself otherwise

    @property
    def projected(self) -> bool:
        return not self.rule.projector.identity

    def basis(self, i: int) -> Basis:
        """The basis of the i-th parameter."""
        return Basis(self.states[i].get("left"), self.states[i].get("right"))

    def project(self) -> None:
        """R = left^T G right^T."""
        if self.projected:
            self.low = [down(G, self.basis(i)) for i, G in enumerate(self.grads)]

    def norms(self) -> Tensor:
        """The norm of each gradient as applied, times the root of its group's weight."""
        wide = torch.promote_types(self.low[0].dtype, torch.float32)
        norms = torch.stack(torch._foreach_norm(self.low, 2, dtype=wide))
        weight = self.group["clip_weight"]
        return norms if weight == 1 else norms * weight**0.5

    def scale_(self, factor: Tensor) -> None:
        """Multiply the gradients as applied by a 0-dim tensor."""
        torch._foreach_mul_(self.low, factor.to(self.low[0].device))

    def add(self, gradients: Mapping[Tensor, Tensor]) -> None:
        """Add gradients of full shape to those as applied."""
        for i, p in enumerate(self.params):
            if p not in gradients:
                continue
            g = gradients[p].to(p.dtype)
            if self.projected:
                self.low[i] += down(as_matrix(g, self.group["leading"]), self.basis(i))
            else:
                self.low[i] += g

    def apply(self) -> None:
        """Move the moments and the weights; the parameters' steps are then counted."""
        for part in self.parts():
            part.move([counted(state) + 1 for state in part.states])
            for state in part.states:
                state["step"] += 1

    def move(self, counts: list[int]) -> None:
        """W -= lr scale N, projected back, with decoupled decay before or after."""
        lr, decay = float(self.group["lr"]), 1.0
        if self.group["weight_decay"]:
            decay = 1 - lr * self.group["weight_decay"]
        first = self.rule.decay == "before"
        direction = self.rule.inner.step(self.low, self.states, counts)
        sizes = [lr * self.rule.scale / c for c in direction.correction]
        if self.projected:
            # one product does decay, projection back and update; after: (1 - d)(W - u)
            for i, N in enumerate(direction.tensors()):
                alpha = -sizes[i] * (1.0 if first else decay)
                add_up_(self.weights[i], N, self.basis(i), alpha=alpha, beta=decay)
                write_back(self.params[i], self.weights[i])
            return
        if decay != 1 and first:
            multiply_(self.weights, decay)
        if direction.denominator is not None and same_dtype(self.weights, direction.numerator):
            values = [-size for size in sizes]
            torch._foreach_addcdiv_(
                self.weights, direction.numerator, direction.denominator, values
            )
        else:
            for W, N, size in zip(self.weights, direction.tensors(), sizes, strict=True):
                W.add_(N, alpha=-size)
        if decay != 1 and not first:
            multiply_(self.weights, decay)

    def parts(self) -> Iterator[Bucket]:
        """This bucket in pieces of at most CHUNK elements, so that temporaries stay small."""
        start, size = 0, 0
        for i, low in enumerate(self.low):
            if size and size + low.numel() > CHUNK:
                yield self.cut(slice(start, i))
                start, size = i, 0
            size += low.numel()
        yield self.cut(slice(start, None))

    def cut(self, piece: slice) -> Bucket:
        return Bucket(
            self.rule,
            self.group,
            self.names[piece],
            self.params[piece],
            self.weights[piece],
            self.grads[piece],
            self.states[piece],
            self.low[piece],
        )


def buckets(group: Mapping[str, Any], states: MutableMapping[Tensor, State]) -> list[Bucket]:
    """The parameters of a group that have a gradient, with state, ready to be moved."""
    found: dict[tuple[Any, ...], Bucket] = {}
    leading = group["leading"]
    for name, p in zip(group["param_names"], group["params"], strict=True):
        if p.grad is None:
            continue
        if p.grad.is_sparse:
            raise UsageError(
                "sparse gradients are not supported",
                [(name, "sparse gradient")],
                "Build the embedding with sparse=False.",
            )
        rule = group["rule"].on(p.shape, leading)
        projected = not rule.projector.identity
        W, G = (as_matrix(t, leading) if projected else t for t in (p, p.grad))
        state = states[p]
        if not state:
            state.update({"step": 0} | ({"due": 0} if projected else {}) | rule.init(W))
        key = (rule, p.dtype, p.device, W.shape if projected else None)
        bucket = found.setdefault(key, Bucket(rule, group, [], [], [], [], [], []))
        bucket.names.append(name)
        bucket.params.append(p)
        bucket.weights.append(W)
        bucket.grads.append(G)
        bucket.states.append(state)
        bucket.low.append(G)
    return list(found.values())


def write_back(p: Tensor, W: Tensor) -> None:
    """Copy W into the parameter where its strides (channels last) allowed no view."""
    if W.data_ptr() != p.data_ptr():
        p.copy_(W.view_as(p))


def same_dtype(a: Tensors, b: Tensors) -> bool:
    return a[0].dtype == b[0].dtype
