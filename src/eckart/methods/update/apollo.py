"""APOLLO: SGD with one scale per row, computed by Adam on a random projection.

    every T steps   P [r, n] with entries N(0, 1/r) from a new seed; P is not stored
    R = G P^T                           [m, r]; N is Adam's direction for R
    phi_j = |N_j| / |R_j|               how much Adam rescales row j
    S = sqrt(scale) phi G               limited so that |S| grows by at most 1 % a step
    W -= lr sqrt(1 - b2^t) / (1 - b1^t) S

Adam is used only to compute phi. Random projections keep lengths, so phi_j is nearly the factor
by which Adam on G itself would scale row j. Nothing is decomposed and no basis is stored.

Take it to pretrain where GaLore's decompositions cost too much: at a quarter of the width its
loss in claims/apollo.py is GaLore's (1.80 nats, Adam 2.03) with 0.39 of Adam's state, GaLore's
being 0.45; apollo-mini needs less. Take Fira or AdamW where the entries of a row differ much in
scale: here they share one factor.

Source: H. Zhu et al., "APOLLO: SGD-like Memory, AdamW-level Performance", MLSys 2025, Alg. 1,
written from its definition. We differ from its code in three points: seeds come from the
parameter's name, so that neither order nor grouping matters; refreshes are spread over the
steps; and a zero gradient does not change the limiter's state. Whether the scale is applied
before or after the limiter (`scale_front` there) makes no difference, since it limits ratios.

m out, n in, r rank; where m < n all of it is transposed, and rows are columns.
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from annotated_types import Ge, Gt

from eckart.optim import Adam, Gaussian, NormGrowth, Refresh, Replaced, Rule
from eckart.recipe.method import Paper, Update


@dataclass(frozen=True)
class APOLLO(Update):
    """Gradient descent with a scale per row, computed by Adam in a random subspace."""

    rank: Annotated[int, Ge(1)] = 256
    """Random directions of the short side. Paper: a quarter of the width. Cut to min(m, n)."""

    every: Annotated[int, Ge(1)] = 200
    """Steps between two draws of directions. Paper: 200."""

    scale: Annotated[float, Gt(0)] = 1.0
    """The update is multiplied by the square root of this. Paper: 1; 128 at rank 1."""

    phi: Literal["line", "matrix"] = "line"
    """One factor per line, a row or where m < n a column, or one per matrix (at rank 1)."""

    gamma: Annotated[float, Gt(1)] | None = 1.01
    """Largest growth of the update's norm from step to step; none for no limit. Paper:
    1.01."""

    side: Literal["auto", "reverse", "left", "right"] = "auto"
    """Which side is projected: auto the short one, reverse the long one."""

    on_refresh: Literal["keep", "reset"] = "keep"
    """The moments at a new draw: kept as they are (code), or reset."""

    stagger: bool = True
    """Spread the draws of the matrices over the steps by a hash of their names. Code: all at
    once."""

    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of the first and of the second moment. Paper: Adam's."""

    eps: Annotated[float, Gt(0)] = 1e-6
    """Added to the root of the second moment. Code: 1e-6."""

    eps_mode: Literal["hf", "torch"] = "hf"
    """Where epsilon and the weight decay are applied: hf as published (epsilon outside the bias
    correction, decay after the update), torch as in torch.optim.AdamW."""

    weight_decay: Annotated[float, Ge(0)] = 0.0
    """Decoupled weight decay, multiplied by the learning rate. Paper: 0."""

    wants: ClassVar = "matrices"
    default_lr: ClassVar = 1e-3
    scratch_lr: ClassVar = 0.01
    mission: ClassVar = False
    paper: ClassVar = Paper(
        "APOLLO: SGD-like Memory, AdamW-level Performance",
        "https://arxiv.org/abs/2412.05270",
        "MLSys 2025",
    )

    def rule(self) -> Rule:
        return Rule(
            inner=Adam(self.betas, self.eps, self.eps_mode),
            projector=Gaussian(self.rank, self.side),
            refresh=Refresh(self.every, self.on_refresh, self.stagger),
            residual=Replaced(self.phi),
            limiter=None if self.gamma is None else NormGrowth(self.gamma),
            scale=self.scale**0.5,
            weight_decay=self.weight_decay,
            decay="after" if self.eps_mode == "hf" else "before",
        )
