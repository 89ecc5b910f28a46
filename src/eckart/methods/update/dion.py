"""Dion: momentum orthogonalised in r directions, with error feedback.

    B += G
    P = orth(B Q^T);  R = P^T B         Q [r, n] of the last step; P [m, r], R [r, n]
    B -= (1 - mu) P R                   only the used part decays: error feedback inside B
    Q = R, each row divided by its length
    W = (1 - lr wd) W - lr sqrt(m / n) P Q

Muon's update by a thin QR and three thin products instead of its large ones. B is as large as
the weights, so no memory is saved against Muon. Vectors, embeddings and head follow AdamW, at
`rest_lr` times the learning rate.

Take it where weights are sharded: r columns and r rows of a matrix are all that is sent. On one
machine take Muon as long as you can afford its products: at a quarter of the width Dion's loss in
claims/dion.py is 1.97 nats, Muon's 1.64, Adam's 2.03. Take sumo where memory is short, trion
(dct-adamw) to be free of the QR.

Source: K. Ahn et al., "Dion: Distributed Orthonormalized Updates", arXiv 2504.05295, Alg. 1,
and its simple code. We differ in four points: the first Q comes from the parameter's name,
so that it is the same on every process; a row of zeros stays zero (there it is divided by
1e-8); everything else follows AdamW (there Lion with scales of its own); and of shards the QR
is one of B Q^T, gathered (there Cholesky's, of a sketch).

m out, n in, r rank.
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from annotated_types import Ge, Gt, Lt

from eckart.optim import Adam, Momentum, Normalised, Refresh, Rule, Warm
from eckart.recipe.method import Paper, Update


@dataclass(frozen=True)
class Dion(Update):
    """Orthonormalised momentum of rank r with error feedback; AdamW for everything else."""

    rank: Annotated[int, Ge(1)] = 256
    """Rank of each step's update. Paper: a quarter of the width and more. At most
    min(m, n)."""

    momentum: Annotated[float, Ge(0), Lt(1)] = 0.95
    """mu, the decay of the part of the momentum that a step uses. Paper: 0.95."""

    step_scale: Literal["ratio", "tall", "rms", "one"] = "ratio"
    """The step's scale for an m x n matrix: sqrt(m / n) (paper), sqrt(max(1, m / n)),
    0.2 sqrt(max(m, n)), or 1."""

    rest_lr: Annotated[float, Gt(0)] = 0.1
    """AdamW's learning rate for vectors, embeddings and head, as a share of this rule's."""

    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's decays for everything else. Code: (0.9, 0.95)."""

    eps: Annotated[float, Gt(0)] = 1e-8
    """AdamW's epsilon."""

    weight_decay: Annotated[float, Ge(0)] = 0.0
    """Decoupled weight decay, multiplied by the learning rate. Code: 0.01."""

    wants: ClassVar = "matrices"
    default_lr: ClassVar = 1e-3
    scratch_lr: ClassVar = 0.01
    mission: ClassVar = False
    paper: ClassVar = Paper(
        "Dion: Distributed Orthonormalized Updates", "https://arxiv.org/abs/2504.05295"
    )

    def rule(self) -> Rule:
        return Rule(
            Normalised(),
            projector=Warm(self.rank),
            refresh=Refresh(1),
            source=Momentum(self.momentum),
            vectors=Adam(self.betas, self.eps),
            scale_by=self.step_scale,
            weight_decay=self.weight_decay,
        )

    def plain_lr(self) -> float:
        return self.rest_lr
