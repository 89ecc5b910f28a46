"""APOLLO-Mini: SGD with one scale per matrix, computed by Adam on one random direction.

    every T steps   p [1, n] with entries N(0, 1) from a new seed; p is not stored
    R = G p^T                           [m, 1]; N is Adam's direction for R
    phi = |N| / |R|                     one number for the whole matrix
    S = sqrt(128) phi G                 limited so that |S| grows by at most 1 % a step
    W -= lr sqrt(1 - b2^t) / (1 - b1^t) S

The state of a matrix is two moments of its long side, a seed and a number. With one direction
phi is too small by about the root of the short side, which the scale compensates.

Take it to pretrain where no optimizer state fits: the state is 0.08 of Adam's for blocks of
width 256. Take apollo where some fits: in claims/apollo_mini.py the loss is 2.03 nats, as Adam's,
and 1.80 with APOLLO's or GaLore's state.

Source: H. Zhu et al., "APOLLO: SGD-like Memory, AdamW-level Performance", MLSys 2025, section
on APOLLO-Mini, written from its definition. It is apollo with other defaults, and differs from
the published code in the points named there.

m out, n in; where m < n all of it is transposed.
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar

from annotated_types import Ge, Gt

from eckart.optim import Adam, Gaussian, NormGrowth, Refresh, Replaced, Rule
from eckart.recipe.method import Paper, Update


@dataclass(frozen=True)
class APOLLOMini(Update):
    """Gradient descent with a scale per matrix, computed by Adam in one random direction."""

    every: Annotated[int, Ge(1)] = 200
    """Steps between two draws of the direction. Paper: 200."""

    scale: Annotated[float, Gt(0)] = 128.0
    """The update is multiplied by the square root of this. Paper: 128."""

    gamma: Annotated[float, Gt(1)] | None = 1.01
    """Largest growth of the update's norm from step to step; none for no limit. Paper:
    1.01."""

    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of the first and of the second moment. Paper: Adam's."""

    eps: Annotated[float, Gt(0)] = 1e-6
    """Added to the root of the second moment. Code: 1e-6."""

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
            inner=Adam(self.betas, self.eps, "hf"),
            projector=Gaussian(1),
            refresh=Refresh(self.every),
            residual=Replaced("matrix"),
            limiter=None if self.gamma is None else NormGrowth(self.gamma),
            scale=self.scale**0.5,
            weight_decay=self.weight_decay,
            decay="after",
        )
