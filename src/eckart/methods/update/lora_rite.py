"""LoRA-RITE: Adam for factor pairs whose update of W does not depend on how B A is split.

Each factor's gradient is made independent of the other factor's size, by an orthonormal basis
U_B of B's columns: with B = U_B R, R = (B^T B)^1/2, and likewise for B in a basis of A's rows,

    g = R^-1 gA = U_B^T G        the gradient of U_B (R A), whatever R is
    P = U_B^T U_B_old            from the basis of the last step to this one
    V = b2 P V P^T + (1 - b2) g g^T / n        a second moment of r x r, not of r x n
    M = b1 P M + (1 - b1) (V + e I)^-1/2 g
    A -= lr R^-1 M

e is the part of V that is lost when the subspace changes; without it the next steps would be too
long. Adam scales each element of A separately, so that with it (B T, T^-1 A) trains differently
from (B, A). The state is one moment per factor and three r x r matrices.

Take it where Adam's result depends on how factors were initialised or rescaled, or for its state,
about half of Adam's. Its loss is that of Adam (1.48 nats in claims/lora_rite.py, at rank 8). Take
LoRA-Pro or AltLoRA to approximate an update of the whole matrix.

Source: J.-N. Yen et al., "LoRA Done RITE: Robust Invariant Transformation Equilibration for
LoRA Optimization", arXiv 2410.20625, Alg. 1, and its code for what the paper leaves open: V
is a mean over the long side and bias-corrected, so that learning rates are near Adam's. We
differ from that code in three points: e is on by default, as in the paper; clipping and skipping
of steps are the optimizer's, as for all rules; and the bases of the last step are not stored,
since r x r products of old and new factors are enough.

m out, n in, r rank; B [m, r], A [r, n].
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from annotated_types import Ge, Gt
from torch import Tensor

from eckart.optim import (
    Adam,
    Factor,
    Inner,
    Moments,
    PairRule,
    Rule,
    Spectrum,
    Stacks,
    grams,
    mixed,
    spectrum,
)
from eckart.recipe.method import Cost, Paper, Update

SMALLEST = 1e-12  # eigenvalues of B^T B below this share of the largest count as zero


def inverse_root(C: Tensor) -> Tensor:
    """C^-1/2 of C = F^T F [*, r, r] in fp64, as a pseudoinverse."""
    vectors, values = spectrum(C)
    kept = values > SMALLEST * values[..., -1:]
    return Spectrum(vectors, torch.where(kept, values.sqrt(), 0)).inverse(0.0)


def escaped(V_old: Tensor, V: Tensor) -> Tensor:
    """The most that a change of basis takes from a second moment [*, r, r] in any direction, [*]:
    the largest decrease of an eigenvalue, or of the trace if that is less."""
    falls = (torch.linalg.eigvalsh(V_old) - torch.linalg.eigvalsh(V)).amax(-1)
    traces = (V_old - V).diagonal(dim1=-2, dim2=-1).sum(-1)
    return torch.minimum(falls, traces).clamp(min=0)


def corrected(beta: float, count: int) -> float:
    """The decay with which a running mean that started at zero is unbiased at step `count`."""
    return beta * (1 - beta ** (count - 1)) / (1 - beta**count)


@dataclass(frozen=True)
class Equilibrated(PairRule):
    """LoRA-RITE's update."""

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-6
    escape: bool = True

    def init(self, B: Tensor, A: Tensor, inner: Inner) -> tuple[Moments, Moments]:
        def moments(own: Tensor) -> Moments:
            lead, r = own.shape[:-2], min(A.shape[-2], B.shape[-1])
            state = {
                "exp_avg": torch.zeros_like(
                    own, dtype=torch.promote_types(own.dtype, torch.float32)
                ),
                "second": own.new_zeros(*lead, r, r, dtype=torch.float64),  # V
                "passage": own.new_zeros(*lead, r, r, dtype=torch.float64),  # B^T U_B_old
            }
            if self.escape:
                state["escaped"] = own.new_zeros(lead, dtype=torch.float64)
            return state

        return moments(B), moments(A)

    def move(self, B: Factor, A: Factor, s: Tensor, inner: Inner) -> None:
        # in fp64 before squaring: the smallest eigenvalues count, and squares lose half the digits
        roots = inverse_root(grams(B.value.double(), A.value.double()))
        A_step = self.direction(A, roots[0])
        B_step = self.direction(B, roots[1])
        B_old, A_old = B.value.clone(), A.value.clone()
        B.move(B_step)
        A.move(A_step)
        A.keep(passage=B.value.across(B_old) @ roots[0])
        B.keep(passage=A.value.across(A_old) @ roots[1])

    def direction(self, factor: Factor, root: Tensor) -> Stacks:
        """R^-1 M for A, given R^-1 of B, or for B, of A."""
        b1, b2 = (corrected(b, factor.counts[0]) for b in self.betas)
        P = root @ factor.small("passage")
        g = mixed((root, factor.grad))
        V_old = factor.small("second")
        carried = P @ V_old @ P.mT
        V = b2 * carried + (1 - b2) * g.across(g, mean=True)
        values, mass = spectrum(V), torch.zeros_like(V[..., 0, 0])
        if self.escape:
            mass = b2 * (factor.small("escaped", 0) + escaped(V_old, carried))
            factor.keep(escaped=mass)
        factor.keep(second=V)
        sizes = (values.values + mass.unsqueeze(-1)).sqrt() + self.eps
        whiten = (1 - b1) * Spectrum(values.vectors, sizes).inverse(0.0)
        M = mixed((b1 * P, factor.state("exp_avg")), (whiten, g))
        factor.keep(exp_avg=M)
        return mixed((root, M))


@dataclass(frozen=True)
class LoRARITE(Update):
    """Adam in orthonormal bases of the factors, with an r x r second moment."""

    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of the momentum and of the second moment. Usual: Adam's."""

    eps: Annotated[float, Gt(0)] = 1e-6
    """Added to the roots of the second moment's eigenvalues. Code: 1e-6."""

    escape: bool = True
    """Add e, what the second moment loses when the bases change (paper); the code does not."""

    weight_decay: Annotated[float, Ge(0)] = 0.0
    """Decoupled weight decay, multiplied by the learning rate."""

    wants: ClassVar = "pairs"
    default_lr: ClassVar = 1e-3
    paper: ClassVar = Paper(
        "LoRA Done RITE: Robust Invariant Transformation Equilibration for LoRA Optimization",
        "https://arxiv.org/abs/2410.20625",
        "ICLR 2025",
    )

    def rule(self) -> Rule:
        pair = Equilibrated(self.betas, self.eps, self.escape)
        return Rule(Adam(self.betas), pair=pair, weight_decay=self.weight_decay)

    def cost(self, m: int, n: int) -> Cost:
        """The state of a factor, whose short side is the rank."""
        return Cost(state=m * n + 2 * min(m, n) ** 2 + (1 if self.escape else 0))
