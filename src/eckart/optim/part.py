"""Base class of a rule's parts, and helpers for lists of tensors."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

Tensors = list[Tensor]  # one tensor per parameter; the maths runs over all of them at once
State = dict[str, Any]  # one parameter's state: tensors, and plain scalars such as "step"
CHUNK = 2**24  # most elements of temporaries at once on a GPU, 64 MB in fp32; on a CPU CACHED


@dataclass(frozen=True)
class Part:
    """Base class: a frozen dataclass of plain values and other parts."""

    def describe(self) -> dict[str, Any]:
        """This part as JSON-ready data: its name, then its fields."""
        return {"part": type(self).__name__} | {
            f.name: plain(getattr(self, f.name)) for f in fields(self)
        }


def counted(state: State) -> int:
    """Completed steps since the moments started or were last reset."""
    return state["step"] - state.get("start", 0)


def plain(value: Any) -> Any:
    """A field's value as JSON-ready data."""
    if isinstance(value, Part):
        return value.describe()
    return [plain(v) for v in value] if isinstance(value, tuple | list) else value


def stacked(tensors: Tensors) -> Tensor:
    """Tensors of one shape as [k, *]; a view if there is only one, so do not change it."""
    return tensors[0].unsqueeze(0) if len(tensors) == 1 else torch.stack(tensors)


# In bf16 on a CPU torch's foreach versions of these two round differently from the plain ones,
# which torch.optim uses there; on a GPU it uses foreach.


def multiply_(tensors: Tensors, factor: float) -> None:
    """Multiply each tensor, in place."""
    if tensors[0].is_cpu:
        for t in tensors:
            t.mul_(factor)
    else:
        torch._foreach_mul_(tensors, factor)


def add_squares_(sums: Tensors, tensors: Tensors, weight: float) -> None:
    """sum += weight * tensor^2, in place."""
    if sums[0].is_cpu:
        for v, t in zip(sums, tensors, strict=True):
            v.addcmul_(t, t, value=weight)
    else:
        torch._foreach_addcmul_(sums, tensors, tensors, weight)
