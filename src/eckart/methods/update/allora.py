"""ALLoRA: LoRA without scale and dropout; the gradient of each output row shrinks as the row grows.

    y = W x + B A x                          B [m, r] starts at zero, A [r, n] random

    c_i = 1 / sqrt(|(B A)_i| + 1 / eta^2)    one factor per output row i
    dB = c G A^T,   dA = B^T (c G)           G = dL/d(B A), whose rows c multiplies

At B = 0 every factor is eta; it falls as the row grows, so that training leaves zero fast and
then slows down. The gradient of the layer's input is not scaled.

Take it for short runs, tens to hundreds of steps, with SGD: after fifty steps in
claims/allora.py its loss is 1.67 nats where LoRA's, without a scale, is 1.70. With Adam take LoRA
and tune its scale (1.60, ALLoRA 1.61): Adam normalises each element of dB, which cancels a slowly
changing factor, so that only the weighting of rows within dA has an effect.

Source: H. Huang and R. Balestriero, "ALLoRA: Adaptive Learning Rate Mitigates LoRA Fatal
Flaws", arXiv 2410.09692, section 4.2; the norm under the root is not squared. There is no
official code. Other implementations called ALLoRA are available through `apply`: `update`
multiplies B's final step by c; `param_row` multiplies each factor's step by
1 / sqrt(|p_i| + 1 / eta^2), where p_i are the factor's own rows at the start.

dA is not a multiple of LoRA's gradient, so an optimizer cannot apply the factor: it is part of
LowRank's backward pass (`branch_gradient`). The result is deliberately not the gradient of the
loss, so a numerical check of gradients fails.

m out, n in, r rank, * any leading dimensions (fused experts).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, ClassVar, Literal

import torch
from annotated_types import Ge, Gt
from torch import Tensor

from eckart.optim import SGD, Adam, Factor, Inner, Moments, PairRule, Rule, Stacks, stepped
from eckart.recipe.method import Cost, Paper, Update, Weights


def row_factor(B: Tensor, A: Tensor, eta: float) -> Tensor:
    """c [*, m] of B [*, m, r], A [*, r, n], in fp32 at least; B A is never formed.

    |(B A)_i|^2 = B_i (A A^T) B_i^T.
    """
    with torch.autocast(B.device.type, enabled=False):
        wide = torch.promote_types(B.dtype, torch.float32)  # bf16 norms vanish near zero
        B, A = B.to(wide), A.to(wide)
        squares = ((B @ (A @ A.mT)) * B).sum(-1)  # [*, m]
        return slowed(squares.clamp(min=0).sqrt(), eta)


def slowed(norm: Tensor, eta: float) -> Tensor:
    """1 / sqrt(norm + 1 / eta^2)."""
    return (norm + eta**-2).rsqrt()


def without_scale(B: Tensor, A: Tensor, scale: float, eta: float) -> Tensor:
    """`row_factor` with the signature of `branch_gradient`; the scale is ignored."""
    return row_factor(B, A, eta)


@dataclass(frozen=True)
class RowRates(PairRule):
    """The inner rule's step times a factor per row: of B by the current c ("product"), or of both
    factors by their own rows' norms at the first step ("parameter")."""

    eta: float = 2.0
    of: Literal["product", "parameter"] = "product"

    def init(self, B: Tensor, A: Tensor, inner: Inner) -> tuple[Moments, Moments]:
        made = inner.init(B), inner.init(A)
        if self.of == "parameter":
            for state, p in zip(made, (B, A), strict=True):
                wide = p.to(torch.promote_types(p.dtype, torch.float32))
                state["row"] = slowed(wide.norm(dim=-1, keepdim=True), self.eta)  # [*, rows, 1]
        return made

    def move(self, B: Factor, A: Factor, s: Tensor, inner: Inner) -> None:
        for factor, rates in zip((B, A), self.rates(B, A), strict=True):
            step, size = stepped(factor, factor.grad, inner)
            if rates:
                step = Stacks(list(torch._foreach_mul(step.tensors, rates)), step.tall)
            factor.move(step, size)

    def rates(self, B: Factor, A: Factor) -> tuple[list[Tensor], list[Tensor]]:
        """The factors on the steps of B and of A, [k, rows, 1] for each stack; empty for 1."""
        if self.of == "parameter":
            return B.state("row").tensors, A.state("row").tensors
        both = zip(B.value.tensors, A.value.tensors, strict=True)
        return [row_factor(b, a, self.eta).unsqueeze(-1) for b, a in both], []


@dataclass(frozen=True)
class ALLoRA(Update):
    """Adam or SGD, with row gradients of a pair scaled down as the row's norm grows."""

    eta: Annotated[float, Gt(0)] = 2.0
    """The factor of a row that is zero; replaces alpha / r. Sensible: 1 to 32."""

    apply: Literal["grad", "update", "param_row"] = "grad"
    """What is scaled. grad: the gradients of A and B, in the backward pass (paper). update: B's
    final step. param_row: each factor's final step, by its own rows at the start."""

    inner: Literal["adam", "sgd"] = "adam"
    """The rule that the scaled gradients go to. Paper: any."""

    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of Adam's first and second moment."""

    eps: Annotated[float, Gt(0)] = 1e-8
    """Added to the root of Adam's second moment."""

    weight_decay: Annotated[float, Ge(0)] = 0.0
    """Decoupled weight decay, multiplied by the learning rate but not by the row factor."""

    wants: ClassVar = "pairs"
    default_lr: ClassVar = {1e-3: {"inner": "adam"}, 1.0: {"inner": "sgd"}}
    mission: ClassVar = True
    paper: ClassVar = Paper(
        "ALLoRA: Adaptive Learning Rate Mitigates LoRA Fatal Flaws",
        "https://arxiv.org/abs/2410.09692",
    )

    def asks(self, weights: Weights) -> Mapping[str, Any]:
        """A scale of 1 and no dropout, which eta replaces."""
        asked = {"alpha": float(getattr(weights, "rank", 1)), "dropout": 0.0}
        stable = getattr(weights, "scaling", "") == "rslora"
        return asked | ({"scaling": "lora"} if stable else {})

    def branch_gradient(self) -> Callable[[Tensor, Tensor, float], Tensor] | None:
        return partial(without_scale, eta=self.eta) if self.apply == "grad" else None

    def rule(self) -> Rule:
        pair: PairRule | None = None
        if self.apply != "grad":
            pair = RowRates(self.eta, "product" if self.apply == "update" else "parameter")
        inner = SGD() if self.inner == "sgd" else Adam(self.betas, self.eps)
        return Rule(inner, pair=pair, weight_decay=self.weight_decay)

    def cost(self, m: int, n: int) -> Cost:
        rows = m if self.apply == "param_row" else 0
        return Cost(state=rows + (0 if self.inner == "sgd" else 2 * m * n))
