"""FRUGAL: Adam on a part of each gradient, sign descent on the rest.

    every T steps   a new subspace: a quarter of the columns, at random; moments are reset
    inside          W -= lr  Adam's direction
    outside         W -= lr outside_scale  sign(G - the part inside)

The part without state is updated, too: the update has full rank while the state is a quarter of
Adam's. Columns drawn at random need no decomposition and no product. Take it to pretrain with
memory between SGD's and Adam's; to fine-tune with outside_scale=0.1. Also try outside=none: in
the 300 steps of claims/frugal.py the signs did harm (1.94 nats with them, 1.79 without, GaLore
1.80). Take Fira where signs are too coarse, LISA or BAdam (here inside=blocks outside=none) where
most of the model should have no gradient.

Source: P. Zmushko et al., "FRUGAL: Memory-Efficient Optimization by Reducing State Overhead
for Scalable Training", ICML 2025, Alg. 1, and its code. We differ from it in three points: a
block is a layer of the model (there a single matrix); refreshes are spread over the steps;
and draws come from the parameter's name, the same on every process and after a resume. With
inside=svd the rest is rounding where a gradient's rank is below r; its signs are then noise.
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from annotated_types import Ge, Gt, Le

from eckart.optim import (
    SVD,
    Adam,
    Blocks,
    Coordinates,
    Memoryless,
    Outside,
    Projector,
    Refresh,
    Rule,
    Selected,
)
from eckart.recipe.method import Cost, Paper, Update


@dataclass(frozen=True)
class FRUGAL(Update):
    """Adam inside a small, changing subspace; a rule without state outside."""

    density: Annotated[float, Gt(0), Le(1)] = 0.25
    """Share of each matrix, or of the blocks, that Adam updates. Paper: 0.25."""

    every: Annotated[int, Ge(1)] = 200
    """Steps between two subspaces of one matrix. Paper: 200."""

    inside: Literal["columns", "rows", "entries", "svd", "dct", "blocks"] = "columns"
    """The subspace: random columns, rows or entries (randk) of each matrix, the gradient's
    leading singular directions, its largest cosine directions (dct-adamw), or whole layers.
    Paper: all but dct."""

    outside: Literal["sign", "sgd", "none"] = "sign"
    """The rule for the rest of the gradient: its signs, the gradient itself (SGD), or no update.
    Paper: sign."""

    outside_scale: Annotated[float, Ge(0)] = 1.0
    """Learning rate outside, as a share of that inside. Paper: 1 to pretrain, 0.1 to
    fine-tune."""

    stagger: bool = True
    """Spread the refreshes of the matrices over the steps by a hash of their names. Code: all
    at once."""

    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of the first and of the second moment. Paper: Adam's."""

    eps: Annotated[float, Gt(0)] = 1e-8
    """Added to the root of the second moment. Paper: 1e-8."""

    weight_decay: Annotated[float, Ge(0)] = 0.0
    """Decoupled weight decay, multiplied by the learning rate, inside and outside."""

    wants: ClassVar = "matrices"
    default_lr: ClassVar = 1e-4
    scratch_lr: ClassVar = 1e-3
    size: ClassVar = "density"
    mission: ClassVar = False
    paper: ClassVar = Paper(
        "FRUGAL: Memory-Efficient Optimization by Reducing State Overhead for Scalable Training",
        "https://arxiv.org/abs/2411.07837",
        "ICML 2025",
    )

    def rule(self) -> Rule:
        adam = Adam(self.betas, self.eps)
        rest = None if self.outside == "none" else Memoryless(self.outside, self.outside_scale)
        if self.inside == "blocks":
            return Rule(
                adam,
                blocks=Blocks(self.density, self.every),
                resting=rest,
                weight_decay=self.weight_decay,
            )
        return Rule(
            adam,
            projector=self.projector(self.inside),
            refresh=Refresh(self.every, "reset", self.stagger),
            residual=None if rest is None else Outside(rest),
            weight_decay=self.weight_decay,
        )

    def plain(self) -> Rule:
        return Rule(Adam(self.betas, self.eps), weight_decay=self.weight_decay)

    def projector(self, inside: Literal["columns", "rows", "entries", "svd", "dct"]) -> Projector:
        if inside == "svd":
            return SVD(self.density)
        if inside == "dct":
            return Selected(self.density)
        return Coordinates(self.density, inside)

    def cost(self, m: int, n: int) -> Cost:
        """The state; with inside=blocks that while the matrix's block trains, else none."""
        return Cost(state=self.rule().state_elements(m, n))
