"""SUMO: Muon inside GaLore's subspace, with an exact decomposition of its small momentum.

    every T steps   P' [r, n]: about the leading right directions of G; M = M P P'^T
    R = G P^T                           [m, r]
    M = mu M + R;  U, s, Vt = svd(M);  O = U Vt
    O = O / q                           q from the limiter on the growth of |O|
    W = (1 - lr wd) W - lr alpha s O P  s = 0.2 sqrt(max(m, n))

Newton-Schulz iterations are least accurate where singular values are far apart, as they are in a
subspace of leading directions; an m x r matrix is small enough for an exact decomposition. The
state is one moment and a basis. Vectors, embeddings and head follow AdamW.

Take it where GaLore's state is still too much: at a quarter of the width it has 0.77 of that,
with a loss of 1.83 nats in claims/sumo.py, GaLore's 1.80. Take GaLore where a decomposition at
every step costs too much, Muon (1.64) where its momentum fits.

Source: Y. Refael et al., "SUMO: Subspace-Aware Moment-Orthogonalization for Accelerating
Memory-Efficient LLM Training", NeurIPS 2025, Alg. 1, written from its definition without its
code. We add `step_scale`, with which one learning rate serves this rule and AdamW; the paper's
scale is "one". O has the same norm at every step as long as M has full rank, so the limiter
rarely acts.

m out, n in, r rank; where m < n all of it is transposed.
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from annotated_types import Ge, Gt, Lt

from eckart.optim import Adam, NormGrowth, Orthogonal, Randomised, Refresh, Rule
from eckart.recipe.method import Paper, Update


@dataclass(frozen=True)
class SUMO(Update):
    """Exactly orthogonalised momentum in a subspace that is recomputed periodically."""

    rank: Annotated[int, Ge(1)] = 128
    """Rank of the projection of the short side. At most min(m, n)."""

    every: Annotated[int, Ge(1)] = 200
    """Steps between two subspaces of one matrix. Paper: 200."""

    momentum: Annotated[float, Ge(0), Lt(1)] = 0.95
    """mu, the decay of the momentum."""

    scale: Annotated[float, Gt(0)] = 1.0
    """alpha, on the update."""

    step_scale: Literal["rms", "one", "tall", "ratio"] = "rms"
    """The step's scale for an m x n matrix: 0.2 sqrt(max(m, n)), 1 (paper),
    sqrt(max(1, m / n)), or sqrt(m / n)."""

    gamma: Annotated[float, Gt(1)] | None = 1.01
    """Largest growth of the update's norm from step to step; none for no limit."""

    oversample: Annotated[int, Ge(0)] = 8
    """Random directions beyond the rank in the randomised SVD that finds a basis."""

    side: Literal["auto", "reverse", "left", "right"] = "auto"
    """Which side is projected: auto the short one, reverse the long one."""

    stagger: bool = True
    """Spread the refreshes of the matrices over the steps by a hash of their names."""

    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's decays for everything else."""

    eps: Annotated[float, Gt(0)] = 1e-8
    """AdamW's epsilon."""

    weight_decay: Annotated[float, Ge(0)] = 0.0
    """Decoupled weight decay, multiplied by the learning rate."""

    wants: ClassVar = "matrices"
    default_lr: ClassVar = 0.001
    mission: ClassVar = False
    paper: ClassVar = Paper(
        "SUMO: Subspace-Aware Moment-Orthogonalization for Accelerating Memory-Efficient LLM "
        "Training",
        "https://arxiv.org/abs/2505.24749",
        "NeurIPS 2025",
    )

    def rule(self) -> Rule:
        return Rule(
            Orthogonal(momentum=self.momentum, exact=True),
            projector=Randomised(self.rank, self.side, oversample=self.oversample),
            refresh=Refresh(self.every, "rotate", self.stagger),
            limiter=None if self.gamma is None else NormGrowth(self.gamma),
            vectors=Adam(self.betas, self.eps),
            scale=self.scale,
            scale_by=self.step_scale,
            weight_decay=self.weight_decay,
        )
