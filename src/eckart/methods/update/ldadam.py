"""LDAdam: Adam in a subspace that is updated at every step, with error feedback.

    A = G + E
    B = rho (M P) / (1 - b1^t) + (1 - rho) A          P [r, n] of the last step
    P' = orth(P B^T B)                                one power iteration
    M' = M P P'^T                                     V likewise, by squared cosines
    R = A P'^T,  moments of R,  W -= lr N P'          Adam
    E = A - R P' + b1 / (1 - b1) (M P - M' P')        lost parts of gradient and momentum

The subspace follows gradient and momentum smoothly, for two thin products and a thin QR a step.
E is as large as the weights (less with `error_bits`). Take it where Adam in few directions must
converge as Adam does: at a sixteenth of the width its loss in claims/ldadam.py is 1.84 nats,
GaLore's 1.96, Adam's 2.03. Its state is 0.66 of Adam's there, so take GaLore, or DCT-AdamW
without error feedback, where memory counts, and Fira for the rest of the gradient without an E.

Source: T. Robert et al., "LDAdam: Adaptive Optimization from Low-Dimensional Gradient
Statistics", ICLR 2025, Alg. 1. We differ from its code in five points: E has a buffer of its
own (there it stays in `p.grad`, so zero_grad must not be called); V is rotated with squared
cosines as in the paper (its code squares twice); a square matrix is projected on the right
(there the left); signs of the directions are fixed; and an error of 8 or 4 bits is possible.

m out, n in, r rank; where m < n all of it is transposed.
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from annotated_types import Ge, Gt, Lt

from eckart.optim import Adam, ErrorFeedback, Iteration, Refresh, Rule
from eckart.recipe.method import Paper, Update


@dataclass(frozen=True)
class LDAdam(Update):
    """Adam in a subspace updated by power iteration at every step, with error feedback."""

    rank: Annotated[int, Ge(1)] = 16
    """Rank of the projection of the short side. Code: 16. At most min(m, n)."""

    rho: Annotated[float, Ge(0), Lt(1)] = 0.908
    """Weight of the momentum, against the gradient, in the matrix that the subspace is computed
    from. Paper: 0.908."""

    power: Annotated[int, Ge(1)] = 1
    """Power iterations per step. Paper: 1."""

    error_bits: Literal[32, 8, 4] = 32
    """Bits per weight of the error E. Paper: those of the weights."""

    side: Literal["auto", "reverse", "left", "right"] = "auto"
    """Which side is projected: auto the short one, reverse the long one."""

    betas: tuple[float, float] = (0.908, 0.99)
    """Decay of the first and of the second moment. Paper: (0.908, 0.99)."""

    eps: Annotated[float, Gt(0)] = 1e-8
    """Added to the root of the second moment. Paper: 1e-8."""

    weight_decay: Annotated[float, Ge(0)] = 0.0
    """Decoupled weight decay, multiplied by the learning rate."""

    wants: ClassVar = "matrices"
    default_lr: ClassVar = 1e-4
    scratch_lr: ClassVar = 1e-3
    mission: ClassVar = False
    paper: ClassVar = Paper(
        "LDAdam: Adaptive Optimization from Low-Dimensional Gradient Statistics",
        "https://arxiv.org/abs/2410.16103",
        "ICLR 2025",
    )

    def rule(self) -> Rule:
        return Rule(
            inner=Adam(self.betas, self.eps),
            projector=Iteration(self.rank, self.side, power=self.power),
            refresh=Refresh(1, "rotate"),
            source=ErrorFeedback(self.error_bits, beta=self.betas[0], mix=self.rho),
            weight_decay=self.weight_decay,
        )
