"""Riemannian preconditioning: each factor's gradient times the other's inverse Gram matrix.

    gA' = (B^T B + d I)^-1 gA        gB' = gB (A A^T + d I)^-1

and then SGD or Adam with gA', gB' as gradients. For W = W0 + s B A and SGD this is scaled
gradient descent: without damping the update of W does not depend on how B A is split, so that
the sizes of A and B do not determine how fast an adapter learns.

Take it with SGD, or where one learning rate should suit adapters of different sizes and ranks.
With SGD its loss in claims/riemannian.py is 1.52 nats, plain SGD's 1.55; with Adam it is that of
Adam alone (1.48), and AdamW is simpler. AltLoRA adds momentum that follows the factors, and
updates one factor after the other.

Source: F. Zhang and M. Pilanci, "Riemannian Preconditioned LoRA for Fine-Tuning Foundation
Models", ICML 2024. As in PEFT, which has it as a wrapper around any optimizer, the scale s is
left to the learning rate, and d is 1e-2 by default.

m out, n in, r rank; B [m, r], A [r, n].
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from annotated_types import Ge, Gt
from torch import Tensor

from eckart.optim import (
    SGD,
    Adam,
    Factor,
    Inner,
    Moments,
    PairRule,
    Rule,
    Stacks,
    grams,
    inverse,
    mixed,
    stepped,
)
from eckart.recipe.method import Cost, Paper, Update


def preconditioned(
    B: Stacks, A: Stacks, gB: Stacks, gA: Stacks, damping: float
) -> tuple[Stacks, Stacks]:
    """gB' and gA' of the module's formula. The inverses are computed in fp64."""
    PB, PA = inverse(grams(B, A), damping).unbind()
    return mixed((PA, gB)), mixed((PB, gA))


@dataclass(frozen=True)
class Preconditioned(PairRule):
    """Applies the inner rule to the preconditioned gradients of both factors."""

    damping: float = 1e-2

    def init(self, B: Tensor, A: Tensor, inner: Inner) -> tuple[Moments, Moments]:
        return inner.init(B), inner.init(A)

    def move(self, B: Factor, A: Factor, s: Tensor, inner: Inner) -> None:
        gB, gA = preconditioned(B.value, A.value, B.grad, A.grad, self.damping)
        B.move(*stepped(B, gB, inner))
        A.move(*stepped(A, gA, inner))


@dataclass(frozen=True)
class Riemannian(Update):
    """Adam or SGD on gradients preconditioned by the other factor's inverse Gram matrix."""

    damping: Annotated[float, Ge(0)] = 1e-2
    """d, added to B^T B and A A^T where they are inverted. PEFT: 1e-2."""

    inner: Literal["adam", "sgd"] = "adam"
    """The rule for the preconditioned gradients. Paper: both; only with sgd the split of B A does
    not matter."""

    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of Adam's first and second moment. Paper: Adam's."""

    eps: Annotated[float, Gt(0)] = 1e-8
    """Added to the root of Adam's second moment."""

    weight_decay: Annotated[float, Ge(0)] = 0.0
    """Decoupled weight decay, multiplied by the learning rate."""

    wants: ClassVar = "pairs"
    default_lr: ClassVar = {1e-3: {"inner": "adam"}, 0.3: {"inner": "sgd"}}
    paper: ClassVar = Paper(
        "Riemannian Preconditioned LoRA for Fine-Tuning Foundation Models",
        "https://arxiv.org/abs/2402.02347",
        "ICML 2024",
    )

    def rule(self) -> Rule:
        inner = SGD() if self.inner == "sgd" else Adam(self.betas, self.eps)
        return Rule(inner, pair=Preconditioned(self.damping), weight_decay=self.weight_decay)

    def cost(self, m: int, n: int) -> Cost:
        return Cost(state=0 if self.inner == "sgd" else 2 * m * n)
