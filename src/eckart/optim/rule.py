"""A rule: how a gradient becomes a change of the weights, as a sentence of small parts.

    G --source--> X --projector--> R --inner--> N --scale, residual--> dW --> W

Parts are frozen dataclasses of plain values. They hold no tensors: what must be remembered
lives in the optimizer's state, under the names that the parts give. A rule is therefore a
value: it can be compared, written into a checkpoint and read by people.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from eckart.errors import UsageError
from eckart.optim.inner import Adam, Inner
from eckart.optim.part import Part
from eckart.optim.project import Identity, Projector
from eckart.optim.refresh import Refresh


@dataclass(frozen=True)
class Rule(Part):
    """The parts, in the order in which a gradient passes them.

    A matrix that the projector cannot take (a vector, or one where nothing would be saved
    and the projector says so) follows `plain`, the inner rule alone.
    """

    inner: Inner = field(default_factory=Adam)
    projector: Projector = field(default_factory=Identity)
    refresh: Refresh = field(default_factory=Refresh)
    scale: float = 1.0  # on the projected-back update, beside the learning rate
    weight_decay: float = 0.0  # decoupled; a group's own value wins
    decay: Literal["before", "after"] = "before"  # the update, as torch does, or after it

    @property
    def plain(self) -> Rule:
        """The inner rule alone, on the full gradient."""
        return dataclasses.replace(self, projector=Identity(), refresh=Refresh(), scale=1.0)

    def on(self, shape: torch.Size | tuple[int, ...], leading: int = 0) -> Rule:
        """The rule that a parameter of this shape really follows: this one, or `plain`."""
        if self.projector.identity or self.projector.takes(shape, leading):
            return self
        return self.plain

    def init(self, W: Tensor) -> dict[str, Tensor]:
        """The state tensors of one matrix W [*, m, n], or of any tensor where nothing is
        projected. On the meta device it costs nothing: see `state_elements`."""
        if self.projector.identity:
            return self.inner.init(W)
        left, right = self.projector.init(W)
        state = {"left": left, "right": right}
        R = self.projector.low(W)
        return {k: v for k, v in state.items() if v is not None} | self.inner.init(R)

    def state_elements(self, *shape: int, leading: int = 0) -> int:
        """Elements of optimizer state that a parameter of this shape takes."""
        rule = self.on(shape, leading)
        W = as_matrix(torch.empty(shape, device="meta"), leading) if len(shape) > 1 else None
        state = rule.init(torch.empty(shape, device="meta") if W is None else W)
        return sum(t.numel() for t in state.values())


def as_matrix(t: Tensor, leading: int = 0) -> Tensor:
    """A parameter or gradient seen as [*, m, n]: all dimensions after the rows are one.

    `leading` dimensions are kept (fused experts have one). A convolution [out, in, kh, kw]
    becomes [out, in*kh*kw]. A view wherever strides allow.
    """
    return t.reshape(*t.shape[: leading + 1], -1) if t.dim() > leading + 2 else t


def difference(saved: Any, current: Any, path: str = "rule") -> list[tuple[str, str]]:
    """Where two described rules differ: (path, "saved -> current") pairs."""
    if isinstance(saved, dict) and isinstance(current, dict):
        keys = list(dict.fromkeys([*saved, *current]))
        return [d for k in keys for d in difference(saved.get(k), current.get(k), f"{path}.{k}")]
    return [] if saved == current else [(path, f"saved {saved!r}, now {current!r}")]


def check_same(saved: dict[str, Any], rule: Rule) -> None:
    """Raise UsageError where a checkpoint was made under another rule."""
    differs = difference(saved, rule.describe())
    if differs:
        raise UsageError(
            "the optimizer's state was saved under another rule",
            differs,
            "Resume with the saved values, or start the optimizer fresh.",
        )
