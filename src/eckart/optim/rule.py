"""Rule: how a gradient becomes a weight update, composed of small parts.

    G --source--> X --projector--> R --inner--> N --scale, residual--> dW --> W

Parts are frozen dataclasses of plain values. They hold no tensors: their state lives in the
optimizer's state, under names that the parts define. Rules can therefore be compared and
stored in a checkpoint as plain data.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any, Literal

import torch
from torch import Tensor

from eckart.errors import UsageError
from eckart.optim.blocks import Blocks
from eckart.optim.inner import Adam, Inner
from eckart.optim.pair import PairRule
from eckart.optim.part import Part, State
from eckart.optim.project import Identity, Projector, as_matrix
from eckart.optim.refresh import Refresh
from eckart.optim.residual import NormGrowth, Residual
from eckart.optim.sharded import Kind, Layout, layout_of, local
from eckart.optim.source import Source

KINDS: dict[str, Kind] = {  # of state tensors that are not sharded as R is
    "row": "row",
    "column": "column",
    "left": "left",
    "right": "right",
    "warm": "right",
    "index": "small",
    "seed": "small",
    "age": "small",
    "limiter": "small",
    "error": "param",
    "buffer": "param",
    "error_ends": "left",
    "cosines": "shared",
    "left_codes": "small",
    "left_ends": "small",
    "right_codes": "small",
    "right_ends": "small",
}


@dataclass(frozen=True)
class Rule(Part):
    """The parts of an update rule.

    A parameter that the projector does not take (a vector, or a matrix where
    `skip_if_no_saving` applies) follows `plain`, the inner rule alone.
    """

    inner: Inner = field(default_factory=Adam)
    projector: Projector = field(default_factory=Identity)
    refresh: Refresh = field(default_factory=Refresh)
    source: Source | None = None  # what is projected; None: the gradient
    residual: Residual | None = None  # how the part of G outside the subspace is applied
    limiter: NormGrowth | None = None  # of that residual's norm; without one of the update's
    blocks: Blocks | None = None  # which parameters train at a time; None: all
    resting: Inner | None = None  # the rule of the others; None: they are frozen
    vectors: Inner | None = None  # the rule of parameters that are no matrices; None: `inner`
    pair: PairRule | None = None  # the rule of factor pairs B, A; others follow the other parts
    scale: float = 1.0  # a factor on the projected-back update, beside the learning rate
    scale_by: Literal["one", "ratio", "tall", "rms"] = "one"  # see `size_of_step`
    weight_decay: float = 0.0  # decoupled; overridden by a group's own value
    decay: Literal["before", "after"] = "before"  # before the update, as in torch, or after it
    rounding: Literal["nearest", "stochastic"] = "nearest"  # of bf16 weights when updated

    def __post_init__(self) -> None:
        if self.refresh.moments == "rotate" and not self.inner.turns:
            raise UsageError(
                "these moments cannot be rotated into another basis",
                [("inner rule", type(self.inner).__name__)],
                "Take on_refresh=keep or on_refresh=reset.",
            )
        chosen = self.projector.identity or "index" in self.projector.names
        if self.inner.ages and not chosen:
            raise UsageError(
                "age_correct needs a fixed basis, whose directions change one by one",
                [("projector", type(self.projector).__name__)],
                "Leave age_correct out.",
            )
        if self.rounding == "stochastic" and self.pair is not None:
            raise UsageError(
                "factor pairs are rounded to nearest",
                [("rounding", "stochastic"), ("pair rule", type(self.pair).__name__)],
                "Train the factors in fp32, or take rounding=nearest.",
            )
        if self.residual is not None and not self.projector.names:
            raise UsageError(
                "a residual needs a projector: without one nothing is left over",
                [("residual", type(self.residual).__name__)],
                "Leave the residual out.",
            )
        if self.residual is not None and self.source is not None:
            raise UsageError(
                "what lies outside the subspace would be applied twice",
                [
                    ("residual", type(self.residual).__name__),
                    ("source", type(self.source).__name__),
                ],
                "Leave one of them out.",
            )
        leading = {"left", "right", "left_codes"} & {*self.projector.names}
        if self.refresh.adaptive is not None and not (leading or self.projector.identity):
            raise UsageError(
                "a fixed basis has no leading direction to adapt the interval by",
                [("refresh.adaptive", str(self.refresh.adaptive))],
                "Leave adaptive out.",
            )
        if self.refresh.moments == "rotate" and not self.projector.orthonormal:
            raise UsageError(
                "moments cannot be rotated between bases that are not orthonormal",
                [("projector", type(self.projector).__name__)],
                "Take on_refresh=keep or on_refresh=reset.",
            )
        needs = self.residual is not None and self.residual.orthonormal
        if self.residual is not None and needs and not self.projector.orthonormal:
            raise UsageError(
                "a residual needs a projector with an orthonormal basis",
                [
                    ("residual", type(self.residual).__name__),
                    ("projector", type(self.projector).__name__),
                ],
                "Take another projector, or leave the residual out.",
            )
        beta = getattr(self.source, "beta", None)
        if beta is not None and not (isinstance(self.inner, Adam) and beta == self.inner.betas[0]):
            raise UsageError(
                "this source feeds back what Adam's first moment loses, with its decay",
                [("inner rule", type(self.inner).__name__), ("beta", str(beta))],
                "Take Adam with the same beta, or leave beta out.",
            )
        if self.residual is not None and min(self.projector.ranks(1, 1)) > 0:
            raise UsageError(
                "a residual needs one side that is not projected",
                [("side", "both"), ("residual", type(self.residual).__name__)],
                "Take side=auto.",
            )

    @property
    def plain(self) -> Rule:
        """The rule of unprojected parameters: the inner rule (or `vectors`) on the gradient."""
        return dataclasses.replace(
            self,
            inner=self.vectors or self.inner,
            vectors=None,
            projector=Identity(),
            refresh=Refresh(),
            source=None,
            residual=None,
            limiter=None,
            pair=None,
            scale=1.0,
            scale_by="one",
        )

    @property
    def at_rest(self) -> Rule:
        """The rule of a parameter while its block does not train."""
        return dataclasses.replace(self.plain, inner=self.resting or self.inner)

    def on(self, shape: torch.Size | tuple[int, ...], leading: int = 0) -> Rule:
        """The rule for a parameter of this shape: this one, or `plain` if it is not projected."""
        if self.projector.identity or self.projector.takes(shape, leading):
            return self
        return self.plain

    def moments(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The state tensors that belong to the inner rule."""
        others = {*self.projector.names, "limiter", "cosines"}
        if self.source is not None:
            others |= set(self.source.names)
        return {name: t for name, t in tensors.items() if name not in others}

    def sides(self, shape: Sequence[int], leading: int = 0) -> tuple[bool, bool]:
        """Whether the left and the right side of this parameter are projected."""
        if self.projector.identity:
            return False, False
        left, right = self.projector.ranks(shape[leading], prod(shape[leading + 1 :]))
        return left > 0, right > 0

    def layout(self, name: str, p: Tensor, leading: int = 0) -> Layout | None:
        """How a parameter that follows this rule is sharded; None where it is not."""
        matrix = not self.projector.identity
        return layout_of(name, p, leading, matrix, *self.sides(p.shape, leading))

    def kind(self, key: str) -> Kind:
        """How the state tensor of this name is sharded where the parameter is."""
        return KINDS.get(key, "low")

    def start(self, p: Tensor, leading: int = 0, layout: Layout | None = None) -> State:
        """The state of a parameter before its first step, sharded as the parameter is."""
        if self.pair is not None:
            return {"step": 0}  # the rest is made by `pair.prepare`, which has both factors
        if self.projector.identity and (layout is None or self.inner.elementwise):
            return {"step": 0} | self.inner.init(p)
        if layout is not None:
            p = local(p).new_empty(1).expand(p.shape)
        if self.projector.identity and layout is not None:
            found = self.inner.init(p)
            return {"step": 0} | {k: layout.place(t, self.kind(k)) for k, t in found.items()}
        W = as_matrix(p, leading)
        state = {"step": 0, "due": 0} | self.refresh.init(W) | self.projector.init(W)
        state |= self.inner.init(self.projector.low(W))
        if self.inner.ages:
            left, right = self.projector.ranks(*W.shape[-2:])
            shape = (left, 1) if left else (1, right)
            state["age"] = W.new_zeros(*W.shape[:-2], *shape, dtype=torch.int32)
        if self.source is not None:
            state |= self.source.init(W)
        if self.limiter is not None:
            wide = torch.promote_types(W.dtype, torch.float32)
            state["limiter"] = W.new_zeros(W.shape[:-2], dtype=wide)
        if layout is not None:
            tensors = {k: t for k, t in state.items() if isinstance(t, Tensor)}
            state |= {k: layout.place(t, self.kind(k)) for k, t in tensors.items()}
        return state

    def state_elements(self, *shape: int, leading: int = 0) -> int:
        """The number of elements in the optimizer state of a parameter of this shape."""
        state = self.on(shape, leading).start(torch.empty(shape, device="meta"), leading)
        return sum(t.numel() for t in state.values() if isinstance(t, Tensor))

    @property
    def passes(self) -> int:
        """Gradients that one step needs, each computed after the previous pass's update."""
        return 1 if self.pair is None else self.pair.passes

    @property
    def idles(self) -> bool:
        """True where some parameters have no gradient at some steps, which DDP must know."""
        resting = self.blocks is not None and self.resting is None
        return resting or (self.pair is not None and self.pair.rests(0) != "")

    def size_of_step(self, m: int, n: int) -> float:
        """`scale` times a factor for the matrix's shape: sqrt(m / n) ("ratio"),
        sqrt(max(1, m / n)) ("tall"), or 0.2 sqrt(max(m, n)) ("rms"), which makes an orthogonal
        step as long as Adam's."""
        by = {"ratio": m / n, "tall": max(1.0, m / n), "rms": 0.04 * max(m, n)}
        return self.scale * by.get(self.scale_by, 1.0) ** 0.5

    @property
    def needs_gradient(self) -> bool:
        """True where the update needs the full G, so that keeping R alone is not enough."""
        whole = not self.projector.names or self.refresh.every == 1
        every_step = not self.projector.identity and whole
        return self.residual is not None or self.source is not None or every_step


def difference(saved: Any, current: Any, path: str = "rule") -> list[tuple[str, str]]:
    """Where two described rules differ: (path, "saved ..., now ...") pairs."""
    if isinstance(saved, dict) and isinstance(current, dict):
        keys = list(dict.fromkeys([*saved, *current]))
        return [d for k in keys for d in difference(saved.get(k), current.get(k), f"{path}.{k}")]
    return [] if saved == current else [(path, f"saved {saved!r}, now {current!r}")]


def check_same(saved: dict[str, Any], rule: Rule) -> None:
    """Raise UsageError where a checkpoint was made with another rule."""
    differs = difference(saved, rule.describe())
    if differs:
        raise UsageError(
            "the optimizer's state was saved under another rule",
            differs,
            "Resume with the saved values, or start the optimizer fresh.",
        )
