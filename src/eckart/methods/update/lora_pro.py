"""LoRA-Pro: factor updates that approximate full fine-tuning's update of the matrix.

A change (hA, hB) of the factors of W = W0 + s B A changes W by E = s (B hA + hB A). The E
nearest to G = dL/dW, the gradient that LoRA never forms, is given by

    hA = 1/s^2 (B^T B)^-1 gA + X A
    hB = 1/s^2 (I - B (B^T B)^-1 B^T) gB (A A^T)^-1 - B X

for every X [r, r], where gA = s B^T G, gB = s G A^T are LoRA's gradients. X affects the
factors, not W; the X that keeps hA and hB nearest to gA and gB solves

    (B^T B) X + X (A A^T) = -1/s^2 (B^T B)^-1 gA A^T.

Adam is applied before that, to E itself: its moments are as large as W (moment_space=full), and
its direction N is converted to factor gradients s B^T N and s N A^T. Learning rates are those of
full fine-tuning.

Take it where tuned LoRA falls behind full fine-tuning and memory suffices for two moments of every
frozen matrix; try LoRA or LoRA+ first, since they cost less: at rank 4 all three end at 1.51 nats
in claims/lora_pro.py, full fine-tuning at 1.44. Take AltLoRA to project with LoRA's memory.

Source: Z. Wang et al., "LoRA-Pro: Are Low-Rank Adapters Properly Optimized?", ICLR 2025,
theorems 2.1 to 2.3 and Alg. 1. We differ from its code in four points: the scale is that of
each module (there always 2); the step count begins at 1 (there 2); moments are fp32 from the
first step on; and it is an ordinary optimizer that is given the pairs by name.

m out, n in, r rank; B [m, r], A [r, n].
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from annotated_types import Ge, Gt
from torch import Tensor

from eckart.decompose.products import CACHED, product
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
    spectrum,
    stepped,
    sylvester,
)
from eckart.optim.part import CHUNK
from eckart.recipe.method import Cost, Paper, Update

Choice = Literal["sylvester", "zero", "symmetric"]


class Frame:
    """The r x r matrices of theorem 2.1 for K pairs B, A, [K, r, r] in fp64.

    Inverses are damped, so that B = 0 gives the limit: hA = 0, as gA = 0, and X = 0.
    """

    def __init__(
        self, B: Stacks, A: Stacks, s: Tensor, damping: float, relative: bool, choice: Choice
    ):
        self.B, self.A, self.s, self.choice = B, A, s, choice
        both = grams(B, A)
        if choice == "sylvester":
            self.both = spectrum(both)
            PB, self.PA = self.both.inverse(damping, relative).unbind()
        else:
            PB, self.PA = inverse(both, damping, relative).unbind()
        self.PB = PB / s**2

    def adjusted(self, gB: Stacks, gA: Stacks, zero: bool = False) -> tuple[Stacks, Stacks]:
        """(hB, hA) for the gradients gB and gA, with the X of `choice`, or X = 0 with `zero`.

        hA = PB gA + X A and hB = gB PA / s^2 - B (PB B^T gB PA + X): four thin products.
        """
        Y = self.PB @ self.B.across(gB) @ self.PA
        of_A = [(self.PB, gA)]
        if self.choice != "zero" and not zero:
            C = self.PB @ gA.across(self.A)
            X = sylvester(self.both, -C) if self.choice == "sylvester" else -0.5 * C @ self.PA
            Y = Y + X
            of_A += [(X, self.A)]
        return mixed((self.PA / self.s**2, gB), (-Y.mT, self.B)), mixed(*of_A)  # PA is symmetric


def adjusted(
    B: Tensor,
    A: Tensor,
    gB: Tensor,
    gA: Tensor,
    s: Tensor,
    choice: Choice = "sylvester",
    damping: float = 1e-8,
    relative: bool = False,
) -> tuple[Tensor, Tensor]:
    """(hB, hA) of theorem 2.1 for one pair of matrices, all in one dtype; see `Frame`."""
    B_, gB_ = (Stacks([t[None]], tall=True) for t in (B, gB))
    A_, gA_ = (Stacks([t[None]], tall=False) for t in (A, gA))
    hB, hA = Frame(B_, A_, s, damping, relative, choice).adjusted(gB_, gA_)
    return hB.tensors[0][0], hA.tensors[0][0]


@dataclass(frozen=True)
class FullMoves(PairRule):
    """LoRA-Pro's update. The inner rule is applied, and has its moments, on the update E of the
    whole matrix (`moments` "full") or on the adjusted factor gradients ("factored")."""

    choice: Choice = "sylvester"
    damping: float = 1e-8
    relative: bool = False
    moments: Literal["full", "factored"] = "full"

    def init(self, B: Tensor, A: Tensor, inner: Inner) -> tuple[Moments, Moments]:
        B, A = (t.to(torch.promote_types(t.dtype, torch.float32)) for t in (B, A))
        if self.moments == "factored":
            return inner.init(B), inner.init(A)
        return inner.init(B.new_empty(*B.shape[:-1], A.shape[-1])), {}

    def move(self, B: Factor, A: Factor, s: Tensor, inner: Inner) -> None:
        frame = Frame(B.value, A.value, s, self.damping, self.relative, self.choice)
        gB, gA = B.grad, A.grad
        if self.moments == "full":
            gB, gA = through_moments(frame, B, A, inner)
        hB, hA = frame.adjusted(gB, gA)
        if self.moments == "factored":
            B.move(*stepped(B, hB, inner))
            A.move(*stepped(A, hA, inner))
        else:
            B.move(hB)
            A.move(hA)


def through_moments(frame: Frame, B: Factor, A: Factor, inner: Inner) -> tuple[Stacks, Stacks]:
    """Factor gradients of the inner rule's direction for E, Alg. 1 lines 6 to 9.

    E and its direction N are formed for some rows at a time, since B^T N is a sum over rows.
    """
    hB, hA = frame.adjusted(B.grad, A.grad, zero=True)
    gB, gA = (Stacks([torch.zeros_like(t) for t in h.tensors], h.tall) for h in (hB, hA))
    scales = hB.cut(frame.s.to(hB.tensors[0].dtype))
    left = [torch.cat(both, -1) for both in zip(B.value.tensors, hB.tensors, strict=True)]
    right = [torch.cat(both, -2) for both in zip(hA.tensors, A.value.tensors, strict=True)]
    torch._foreach_mul_(left, scales)  # left right = E
    of_B = zip(*(B.pieces(t) for t in (B.value, Stacks(left, True), gB)), strict=True)
    of_A = zip(*(A.pieces(t) for t in (A.value, Stacks(right, False), gA)), strict=True)
    correction = 1.0
    for entry, (b, lb, to_b), (a, ra, to_a) in zip(B.entries, of_B, of_A, strict=True):
        rows = max(1, (CACHED if b.is_cpu else CHUNK) // a[..., :1, :].numel())
        for start in range(0, b.shape[-2], rows):
            some = (..., slice(start, start + rows), slice(None))
            moments = {name: t[some] for name, t in entry.tensors.items()}
            direction = inner.step([product(lb[some], ra)], [moments], [B.counts[0]], fused=True)
            N, correction = direction.tensors()[0], direction.correction[0]  # one for all
            to_a += product(b[some].mT, N)
            to_b[some] = product(N, a.mT)
    for g in (gB, gA):
        torch._foreach_mul_(g.tensors, [s / correction for s in scales])
    return gB, gA


@dataclass(frozen=True)
class LoRAPro(Update):
    """Adam's update of the whole matrix, approximated by updates of its two factors."""

    choice: Literal["sylvester", "zero", "symmetric"] = "sylvester"
    """X: nearest to the factors' gradients (paper), zero, or an even split. It affects the
    factors, not the matrix."""

    moment_space: Literal["full", "factored"] = "full"
    """Adam's moments: of the whole matrix's update (paper; as large as the frozen matrix), or of
    each factor's, with which the update no longer approximates Adam on the matrix."""

    inner: Literal["adam", "sgd"] = "adam"
    """The rule that is applied to E. Paper: both."""

    damping: Annotated[float, Ge(0)] = 1e-8
    """Added to B^T B and A A^T where they are inverted. Code: 1e-8."""

    damping_mode: Literal["abs", "rel"] = "abs"
    """Damping as it is (code), or times the mean eigenvalue, which is safer where B is tiny."""

    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of the first and of the second moment. Paper: Adam's."""

    eps: Annotated[float, Gt(0)] = 1e-8
    """Added to the root of the second moment. Paper: 1e-8."""

    weight_decay: Annotated[float, Ge(0)] = 0.0
    """Decoupled weight decay, multiplied by the learning rate. Paper: 0."""

    wants: ClassVar = "pairs"
    default_lr: ClassVar = {1e-4: {"inner": "adam"}, 0.1: {"inner": "sgd"}}  # as full training
    mission: ClassVar = True
    paper: ClassVar = Paper(
        "LoRA-Pro: Are Low-Rank Adapters Properly Optimized?",
        "https://arxiv.org/abs/2407.18242",
        "ICLR 2025",
    )

    def rule(self) -> Rule:
        relative = self.damping_mode == "rel"
        if self.inner == "sgd":  # has no moments: the gradients themselves are adjusted
            pair = FullMoves(self.choice, self.damping, relative, "factored")
            return Rule(SGD(), pair=pair, weight_decay=self.weight_decay)
        pair = FullMoves(self.choice, self.damping, relative, self.moment_space)
        return Rule(self.adam(), pair=pair, weight_decay=self.weight_decay)

    def plain(self) -> Rule:
        return Rule(self.adam(), weight_decay=self.weight_decay)

    def adam(self) -> Adam:
        return Adam(self.betas, self.eps)

    def cost(self, m: int, n: int) -> Cost:
        """The state of a pair's m x n matrix; with moment_space=factored, of an m x n factor."""
        return Cost(state=0 if self.inner == "sgd" else 2 * m * n)
