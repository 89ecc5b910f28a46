"""Where a parameter's rows and columns lie on the processes, and what must be summed.

A DTensor (FSDP2, tensor parallelism) is unwrapped once: the parts see local tensors only.
What is then left to do between processes follows from which dimension is sharded and which
is projected:

    down            a sharded side that is projected leaves partial sums of R
    norms           over every sharded side that is not projected
    a new basis     right side of sharded rows: from the summed Gram matrix; else gathered
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from eckart.errors import UsageError
from eckart.optim.part import Tensors

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

Kind = Literal["param", "left", "right", "low", "small"]


def is_sharded(t: Tensor) -> bool:
    """Is this a DTensor? Importing their module takes half a second: only if it is there."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(t, module.DTensor)


def local(t: Tensor) -> Tensor:
    """This process's piece of a DTensor; any other tensor as it is. Shares memory."""
    return t.to_local() if is_sharded(t) else t  # type: ignore[attr-defined]


def whole(t: Tensor) -> Tensor:
    """The full tensor, gathered on every process where it is a DTensor."""
    return t.full_tensor() if is_sharded(t) else t  # type: ignore[attr-defined]


@dataclass(frozen=True)
class Layout:
    """How a parameter seen as [*, m, n] lies on a device mesh, and how its state follows.

    `left` and `right`: is that side projected? A parameter that is whole on each process
    has None in the place of a layout.
    """

    mesh: Any
    axes: tuple[str, ...]  # what each mesh dimension splits: lead, rows, columns or nothing
    placements: tuple[Any, ...]  # the parameter's own
    leading: int
    left: bool
    right: bool

    def groups(self, *axes: str) -> tuple[dist.ProcessGroup, ...]:
        """The process groups over which any of these axes is split."""
        return tuple(self.mesh.get_group(i) for i, axis in enumerate(self.axes) if axis in axes)

    @property
    def every(self) -> tuple[dist.ProcessGroup, ...]:
        """All groups over which the parameter is split."""
        return self.groups("lead", "rows", "columns")

    @property
    def partial(self) -> tuple[dist.ProcessGroup, ...]:
        """Over which groups a local left^T G right^T has yet to be summed."""
        return self.groups(*["rows"] * self.left, *["columns"] * self.right)

    @property
    def split(self) -> tuple[dist.ProcessGroup, ...]:
        """Over which groups R, or G where nothing is projected, is split."""
        return self.groups(*self.kept("low"))

    @property
    def gram_suffices(self) -> bool:
        """Can a new basis be found from G^T G, summed over the shards of the rows?"""
        return self.right and not self.left and not self.groups("lead", "columns")

    def kept(self, kind: Kind) -> list[str]:
        """Which splits of the parameter a tensor of this kind shares."""
        rows = kind in ("param", "left") or (kind == "low" and not self.left)
        columns = kind in ("param", "right") or (kind == "low" and not self.right)
        return ["lead", *["rows"] * rows, *["columns"] * columns]

    def place(self, t: Tensor, kind: Kind) -> DTensor:
        """A full tensor, the same on all processes, laid out beside the parameter.

        `kind`: shaped like the parameter, left [*, m, r], right [*, r, n], like R, or small
        (leading dimensions, then what all processes share).
        No communication.
        """
        from torch.distributed.tensor import Replicate, distribute_tensor

        kept = self.kept(kind)
        placements = [
            placement if axis in kept else Replicate()
            for axis, placement in zip(self.axes, self.placements, strict=True)
        ]
        return distribute_tensor(t, self.mesh, placements, src_data_rank=None)

    def gather(self, t: Tensor, p: Tensor) -> Tensor:
        """The whole tensor of which this process has the part t, split as the parameter is."""
        from torch.distributed.tensor import DTensor

        part = t.reshape(local(p).shape)
        kept = DTensor.from_local(
            part, self.mesh, self.placements, run_check=False, shape=p.shape, stride=p.stride()
        )
        return kept.full_tensor()


def layout_of(name: str, p: Tensor, leading: int, left: bool, right: bool) -> Layout | None:
    """The layout of a parameter; None where it is whole on this process."""
    if not is_sharded(p):
        return None
    axes = []
    for placement in p.placements:  # type: ignore[attr-defined]
        dim = placement.dim if placement.is_shard() else None
        if dim is None:
            axes.append("nothing")
        elif dim <= leading:
            axes.append("rows" if dim == leading else "lead")
        elif p.dim() == leading + 2 or not (left or right):
            axes.append("columns")
        else:
            raise UsageError(
                "a convolution that is sharded along its inputs cannot be projected",
                [(name, f"{tuple(p.shape)}, {placement}")],
                "Shard it along its outputs (dimension 0), or leave it out of update.targets.",
            )
    mesh, placements = p.device_mesh, tuple(p.placements)  # type: ignore[attr-defined]
    return Layout(mesh, tuple(axes), placements, leading, left, right)


def sum_(tensors: Tensors, groups: tuple[dist.ProcessGroup, ...], mean: bool = False) -> None:
    """Sum (or average) each tensor over the groups, in place: one collective per group."""
    if not groups or not tensors:
        return
    flat = torch.cat([t.reshape(-1) for t in tensors])
    for group in groups:
        dist.all_reduce(flat, group=group)
        if mean:
            flat /= dist.get_world_size(group)
    for t, piece in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
        t.copy_(piece.view_as(t))
