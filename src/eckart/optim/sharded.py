"""How parameters and their state are sharded over processes, and the collectives they need.

A DTensor (FSDP2, tensor parallelism) is unwrapped once: the parts see local tensors only. The
communication needed depends on which dimension is sharded and which is projected:

    down            a sharded side that is projected leaves partial sums of R
    norms           over every sharded side that is not projected
    row and column  sums over the other dimension's shards
    means
    a new basis     of sharded rows: from a summed Gram matrix, from products with a few
                    directions, which are summed and gathered, or, on the left, from all rows
                    of a share of the columns (`columns_of`); else G is gathered

Where experts are sharded, each process computes the bases of its own (`Layout.own`).
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from eckart.errors import UsageError
from eckart.optim.part import Tensors

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

Kind = Literal["param", "left", "right", "low", "row", "column", "small", "shared"]
Groups = tuple[dist.ProcessGroup, ...]


class Split(NamedTuple):
    """The process groups over which tensors [*, a, b] are split; by default none."""

    rows: Groups = ()  # along a
    columns: Groups = ()  # along b
    every: Groups = ()  # along any dimension


def is_sharded(t: Tensor) -> bool:
    """True for a DTensor. Does not import the DTensor module, which takes half a second."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(t, module.DTensor)


def local(t: Tensor) -> Tensor:
    """This process's shard of a DTensor, sharing memory; any other tensor as it is."""
    return t.to_local() if is_sharded(t) else t  # type: ignore[attr-defined]


def whole(t: Tensor) -> Tensor:
    """The full tensor, gathered on every process where it is a DTensor."""
    return t.full_tensor() if is_sharded(t) else t  # type: ignore[attr-defined]


def sharded_as(other: Tensor, t: Tensor) -> Tensor:
    """A full tensor, equal on all processes, sharded as `other`, which has the same shape."""
    if not is_sharded(other):
        return t
    from torch.distributed.tensor import distribute_tensor

    mesh, placements = other.device_mesh, other.placements  # type: ignore[attr-defined]
    return distribute_tensor(t.to(other.device), mesh, placements, src_data_rank=None)


@dataclass(frozen=True)
class Layout:
    """How a parameter [*, m, n] and its state are sharded over a device mesh.

    `left` and `right` are True where that side is projected. A parameter that is not sharded
    has None instead of a layout.
    """

    mesh: Any
    axes: tuple[str, ...]  # what each mesh dimension shards: lead, rows, columns or nothing
    placements: tuple[Any, ...]  # the parameter's own
    leading: int
    left: bool
    right: bool
    dims: int  # number of dimensions of R, or of G where it is no matrix

    def groups(self, *axes: str) -> Groups:
        """The process groups over which any of these axes is sharded."""
        return tuple(self.mesh.get_group(i) for i, axis in enumerate(self.axes) if axis in axes)

    @property
    def every(self) -> Groups:
        """All process groups over which the parameter is sharded."""
        return self.groups("lead", "rows", "columns")

    @property
    def partial(self) -> Groups:
        """The groups over which a local left^T G right^T must be summed to give R."""
        return self.groups(*["rows"] * self.left, *["columns"] * self.right)

    @property
    def split(self) -> Groups:
        """The groups over which R, or G where nothing is projected, is sharded."""
        return self.groups(*self.kept("low"))

    @cached_property
    def own(self) -> Layout:
        """The layout of this process's experts alone, as if there were no others."""
        from torch.distributed.tensor import Replicate

        if "lead" not in self.axes:
            return self
        splits = zip(self.axes, self.placements, strict=True)
        placements = tuple(Replicate() if axis == "lead" else p for axis, p in splits)
        axes = tuple("nothing" if axis == "lead" else axis for axis in self.axes)
        return replace(self, axes=axes, placements=placements)

    @property
    def dims_of_low(self) -> set[int]:
        """The dimensions along which R, or G where nothing is projected, is sharded."""
        kept = self.kept("low")
        splits = zip(self.axes, self.placements, strict=True)
        return {placement.dim for axis, placement in splits if axis in kept}

    @property
    def split_of_low(self) -> Split:
        """The split of R [*, a, b], or of G where nothing is projected."""

        def along(dim: int) -> Groups:
            places = enumerate(zip(self.axes, self.placements, strict=True))
            kept = self.kept("low")
            found = [i for i, (axis, p) in places if axis in kept and p.dim == dim]
            return tuple(self.mesh.get_group(i) for i in found)

        return Split(along(self.dims - 2), along(self.dims - 1), self.split)

    def kept(self, kind: Kind) -> list[str]:
        """The axes along which a tensor of this kind is sharded if the parameter is."""
        like_low = kind in ("low", "row", "column")
        rows = kind in ("param", "left") or (like_low and not self.left)
        columns = kind in ("param", "right") or (like_low and not self.right)
        return [*["lead"] * (kind != "shared"), *["rows"] * rows, *["columns"] * columns]

    def followed(self, placement: Any, kind: Kind) -> Any:
        """The parameter's placement translated to a tensor of this kind: row statistics lack the
        last dimension, column statistics the one before it."""
        from torch.distributed.tensor import Replicate, Shard

        gone = {"row": self.dims - 1, "column": self.dims - 2}.get(kind)
        if gone is None or placement.dim < gone:
            return placement
        return Replicate() if placement.dim == gone else Shard(placement.dim - 1)

    def placements_of(self, kind: Kind) -> list[Any]:
        """The DTensor placements of a tensor of this kind."""
        from torch.distributed.tensor import Replicate

        kept = self.kept(kind)
        return [
            self.followed(placement, kind) if axis in kept else Replicate()
            for axis, placement in zip(self.axes, self.placements, strict=True)
        ]

    def place(self, t: Tensor, kind: Kind) -> DTensor:
        """Shard a full tensor, equal on all processes, as a state tensor of this kind.

        `kind`: "param" like the parameter, "left" [*, m, r], "right" [*, r, n], "low" like R
        [*, a, b], "row" [*, a] and "column" [*, b] for statistics of R, "small" sharded along
        leading dimensions only, "shared" not at all. No communication.
        """
        from torch.distributed.tensor import distribute_tensor

        return distribute_tensor(t, self.mesh, self.placements_of(kind), src_data_rank=None)

    @property
    def shard(self) -> int:
        """The index of the shard of the parameter that this process holds."""
        place = 0
        for i, axis in enumerate(self.axes):
            if axis != "nothing":
                place = place * self.mesh.size(i) + self.mesh.get_local_rank(i)
        return place

    def gather(self, t: Tensor, shape: torch.Size, kind: Kind = "param") -> Tensor:
        """The full tensor of this shape and kind, of which t is this process's shard."""
        from torch.distributed.tensor import DTensor

        stride = torch.empty(shape, device="meta").stride()
        placements = self.placements_of(kind)
        part = DTensor.from_local(
            t.contiguous(), self.mesh, placements, run_check=False, shape=shape, stride=stride
        )
        return part.full_tensor()


@dataclass(frozen=True)
class Rows:
    """The rows of matrices [k, *, m, b] that this process holds; all where layout is None."""

    layout: Layout | None = None
    m: int = 0  # rows of the full matrices

    def total(self, t: Tensor) -> Tensor:
        """The sum of t over the shards of rows, in place."""
        if self.layout is not None:
            sum_([t], self.layout.groups("rows"))
        return t

    def part(self, t: Tensor) -> Tensor:
        """This process's rows of a full t, which is equal on all processes."""
        if self.layout is None:
            return t
        return local(self.layout.place(t.movedim(0, -1), "left")).movedim(-1, 0)

    def whole(self, t: Tensor) -> Tensor:
        """All rows, gathered; t are this process's."""
        if self.layout is None:
            return t
        stacked_last = t.movedim(0, -1)  # [*, rows, b, k]: sharded as one matrix is
        *lead, _, b, k = stacked_last.shape
        shape = torch.Size([*lead, self.m, b, k])
        return self.layout.gather(stacked_last, shape, "left").movedim(-1, 0)


def columns_of(t: Tensor, layout: Layout, m: int) -> Tensor:
    """Reshard matrices from rows to columns: t [*, a, n], a shard of m rows, gives [*, m, b].

    The n columns are divided as DTensor would. With p processes each sends 1 / p of what
    gathering the matrices would send, and then works on 1 / p of the columns.
    """
    (group,) = layout.groups("rows")
    *lead, a, n = t.shape
    rows, columns = (shares(size, dist.get_world_size(group)) for size in (m, n))
    b, stack = columns[dist.get_rank(group)], prod(lead)
    sent = torch.cat([part.reshape(-1) for part in t.split(columns, -1)])
    sizes = [stack * rows_there * b for rows_there in rows]
    found = t.new_empty(sum(sizes))
    dist.all_to_all_single(found, sent, sizes, [stack * a * there for there in columns], group)
    parts = zip(found.split(sizes), rows, strict=True)
    return torch.cat([part.view(*lead, rows_there, b) for part, rows_there in parts], -2)


def shares(size: int, count: int) -> list[int]:
    """The lengths of a DTensor's shards: ceil(size / count) each, the last ones less."""
    most = -(-size // count)
    return [max(0, min(most, size - i * most)) for i in range(count)]


def layout_of(
    name: str, p: Tensor, leading: int, matrix: bool, left: bool, right: bool
) -> Layout | None:
    """The layout of a parameter, viewed as a matrix [*, m, n] if `matrix`; None where it is not
    sharded. Raises UsageError for a convolution sharded along its inputs."""
    if not is_sharded(p):
        return None
    axes = []
    for placement in p.placements:  # type: ignore[attr-defined]
        dim = placement.dim if placement.is_shard() else None
        if dim is None:
            axes.append("nothing")
        elif dim <= leading:
            axes.append("rows" if dim == leading else "lead")
        elif p.dim() == leading + 2 or not matrix:
            axes.append("columns")
        else:
            raise UsageError(
                "a convolution that is sharded along its inputs cannot be projected",
                [(name, f"{tuple(p.shape)}, {placement}")],
                "Shard it along its outputs (dimension 0), or leave it out of update.targets.",
            )
    mesh, placements = p.device_mesh, tuple(p.placements)  # type: ignore[attr-defined]
    dims = leading + 2 if matrix else p.dim()
    return Layout(mesh, tuple(axes), placements, leading, left, right, dims)


def sum_(tensors: Tensors, groups: Groups, mean: bool = False) -> None:
    """Sum (or average) each tensor over the groups, in place, with one collective per group."""
    if not groups or not tensors:
        return
    flat = torch.cat([t.reshape(-1) for t in tensors])
    for group in groups:
        dist.all_reduce(flat, group=group)
        if mean:
            flat /= dist.get_world_size(group)
    for t, piece in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
        t.copy_(piece.view_as(t))


def sum_symmetric_(tensors: Tensors, groups: Groups) -> None:
    """`sum_` for symmetric matrices [*, n, n]; sends only n (n + 1) / 2 numbers of each."""
    if not groups:
        return
    places = [torch.triu_indices(*t.shape[-2:], device=t.device).unbind() for t in tensors]
    upper = [t[..., i, j] for t, (i, j) in zip(tensors, places, strict=True)]
    sum_(upper, groups)
    for t, (i, j), half in zip(tensors, places, upper, strict=True):
        t[..., i, j] = half
        t[..., j, i] = half
