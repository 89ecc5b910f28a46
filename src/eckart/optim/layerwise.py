"""Layer-wise mode: each gradient is projected during the backward pass and then freed.

A hook on each projected parameter accumulates R = left^T G right^T over micro-batches and drops
G, so that the full gradients of those parameters never exist together. R is linear in G while
the basis stays, so `step()` gives the same result as without the mode. A parameter whose basis
is due for a refresh needs the step's full gradient and keeps it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from eckart.errors import UsageError
from eckart.optim.bucket import Bucket
from eckart.optim.entry import Entry, spoilt
from eckart.optim.project import as_matrix
from eckart.optim.refresh import refresh
from eckart.optim.sharded import sum_


class Projected:
    """The low-rank gradients accumulated in this step, by name, and the hooks that collect them.

    A rule that needs the full G at its update is applied inside the hook; a step is then one
    micro-batch, and clipping, which needs all gradients first, is refused. The norm is still
    measured.

    `refresh_from`: "step" keeps the full gradient of parameters that are due (in the first step
    all are) and equals the normal mode exactly; "first" computes the basis from the first
    micro-batch, so that no full gradient is kept: the same where a step is one micro-batch.
    """

    def __init__(
        self, refresh_from: Literal["step", "first"], average_over: dist.ProcessGroup | None
    ):
        self.refresh_from = refresh_from
        self.average_over = average_over
        self.low: dict[str, Tensor] = {}
        self.moved: dict[str, Tensor] = {}  # by their hook, in this step: squared norms
        self.handles: dict[Tensor, RemovableHandle] = {}

    def bind(self, params: Iterable[Tensor], absorb: Callable[[Tensor], None]) -> None:
        """Register hooks on exactly these parameters; others are removed."""
        wanted = set(params)
        for p in set(self.handles) - wanted:
            self.handles.pop(p).remove()
        for p in wanted - set(self.handles):
            self.handles[p] = p.register_post_accumulate_grad_hook(absorb)

    def absorb(self, entry: Entry, skip_nonfinite: bool = False) -> None:
        """Project and free the parameter's gradient, unless it must be kept until the step."""
        if entry.rule.needs_gradient:
            if not (skip_nonfinite and spoilt([entry])):  # otherwise `step()` skips
                self.move(entry)
            return
        if entry.state["due"] <= entry.state["step"]:
            if self.refresh_from == "step":
                return
            refresh([entry])
        R = entry.lower(entry.A)
        if entry.name in self.low:
            self.low[entry.name] += R
        else:
            self.low[entry.name] = R
        entry.param.grad = None

    def move(self, entry: Entry) -> None:
        """Do the whole step of one parameter and free its gradient."""
        if entry.name in self.moved:
            raise UsageError(
                "this update rule cannot accumulate micro-batches layer by layer",
                [(entry.name, "a second gradient before step()")],
                "Set train.accumulate=1, or leave layer-wise mode out.",
            )
        bucket = Bucket([entry])
        bucket.project()
        squares = bucket.norms().square()
        if entry.layout is not None:
            sum_([squares], entry.layout.split)
        self.moved[entry.name] = squares
        bucket.apply()
        entry.param.grad = None

    def clear(self) -> None:
        """Drop what was collected, for a new step."""
        self.low.clear()
        self.moved.clear()

    def norm(self, rest: Tensor) -> Tensor:
        """The norm of all gradients as applied, given that of the parameters moved in `step()`."""
        squares = [s.to(rest.device, rest.dtype) for s in self.moved.values()]
        return (rest.square() + torch.cat(squares).sum()).sqrt() if squares else rest

    def average(self, buckets: list[Bucket]) -> None:
        """Average over processes what DDP's reducer leaves out: R, and G where a refresh is due."""
        if self.average_over is None:
            return
        for bucket in buckets:
            if bucket.entries[0].projected:
                tensors = [e.gradient if e.low is None else e.low for e in bucket.entries]
                sum_(tensors, (self.average_over,), mean=True)


def peak_gradient_bytes(groups: Iterable[dict[str, Any]], refresh_from: str) -> int:
    """The most bytes of gradients, full and projected, that exist at the same time."""
    held, largest = 0, 0
    for group in groups:
        for p in group["params"]:
            rule, leading = group["rule"].on(p.shape, group["leading"]), group["leading"]
            size = p.numel() * p.element_size()
            if rule.projector.identity or refresh_from == "step":
                held += size  # in the first step every basis is due, so every gradient is kept
            elif not rule.needs_gradient:
                W = as_matrix(torch.empty(p.shape, dtype=p.dtype, device="meta"), leading)
                held += rule.projector.low(W).numel() * p.element_size()
                largest = max(largest, size)
            else:
                largest = max(largest, size)
    return held + largest


def check_layerwise(
    groups: list[dict[str, Any]],
    refresh_from: str,
    average_over: dist.ProcessGroup | None,
    clip: float | None,
) -> None:
    """Raise UsageError where layer-wise mode cannot work with these settings or saves nothing."""
    if all(group["rule"].projector.identity for group in groups):
        raise UsageError(
            "layer-wise mode frees nothing here",
            [("update rule", "projects no gradient")],
            "Leave layer-wise mode out, or take update=galore.",
        )
    if average_over is not None and refresh_from == "first":
        raise UsageError(
            "a basis cannot come from one process's first micro-batch",
            [("refresh_from", "first, with gradients averaged over processes")],
            'Take refresh_from="step".',
        )
    if not any(group["rule"].needs_gradient for group in groups):
        return
    if clip is not None and clip != float("inf"):
        raise UsageError(
            "this update rule cannot be clipped layer by layer",
            [("update rule", "needs the whole gradient, which is gone when the norm is known")],
            "Set train.clip=null, or leave layer-wise mode out.",
        )
    if refresh_from == "step":
        raise UsageError(
            "this update rule cannot wait for the step layer by layer",
            [("update rule", "needs the whole gradient at its update")],
            'Take refresh_from="first" with one micro-batch a step, or leave layer-wise mode out.',
        )
