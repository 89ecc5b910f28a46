"""AltLoRA: each LoRA factor follows the full gradient projected on the other factor.

With B fixed, the step of A that brings W = W0 + s B A nearest to a step along the full gradient
G, and the step of B with A fixed, are

    hA = 1/s^2 (B^T B + d I)^-1 gA        s B hA is G, projected on B's columns
    hB = 1/s^2 gB (A A^T + d I)^-1        s hB A is G, projected on A's rows

where gA = s B^T G and gB = s G A^T are LoRA's gradients. A's momentum M_A belongs to the B of the
last step. It is transformed so that B M_A changes least with the present B, and likewise for B:

    M_A = b1 (B^T B + d I)^-1 B^T B_old M_A + (1 - b1) hA      A -= lr / (1 - b1^t) M_A
    M_B = b1 M_B A_old A^T (A A^T + d I)^-1 + (1 - b1) hB      B -= lr / (1 - b1^t) M_B

AltLoRA+ (`plus`) divides each step by the root of a second moment of h, element by element, as
Adam does. Learning rates are then near Adam's. Without `plus` steps are as long as gradients are,
rates are those of SGD on whole matrices, and W's update does not depend on how B A is split. State
is a momentum and a copy of the factors, as much as LoRA's with Adam; with `plus` half as much more.

Take LoRA with AdamW first: with every rate tuned its loss in claims/altlora.py is 1.51 nats,
AltLoRA+'s 1.52, AltLoRA's 1.55. Take AltLoRA where factors start out of balance: an A ten times
too long costs it 0.01 there, and SGD 0.02. Take LoRA-Pro to update both factors jointly.

Source: X. Yu et al., "AltLoRA: Towards Better Gradient Approximation in Low-Rank Adaptation
with Alternating Projections", arXiv 2505.12455, Alg. 1 and 2. We differ from its code in
four points: 1/s^2 is part of h (`scale_grad`); AltLoRA+ keeps the carried momentum, as the
paper has it (`store_unaligned`); the learning rate is the group's, so schedules work; and in
alternate mode the frozen factor does not change at all.

m out, n in, r rank; B [m, r], A [r, n].
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from annotated_types import Ge, Gt
from torch import Tensor

from eckart.optim import Adam, Factor, Inner, Moments, PairRule, Rule, Stacks, inverse, mixed
from eckart.recipe.method import Cost, Paper, Update


def projection(F: Stacks, s: Tensor, damping: float, relative: bool) -> tuple[Tensor, Tensor]:
    """P = (F^T F + d I)^-1 and P / s^2, [K, r, r] fp64, for the fixed factors F.

    The second is zero where F is zero, so that nothing changes.
    """
    C = F.across(F)
    P = inverse(C, damping, relative)
    alive = C.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None] > 0
    return P, P * (alive / s**2)


def carrier(P: Tensor, F: Stacks, F_old: Stacks) -> Tensor:
    """T = P F^T F_old [K, r, r] fp64: M' = T M minimises |F M' - F_old M| for M [r, n]."""
    return P @ F.across(F_old)


@dataclass(frozen=True)
class Alternating(PairRule):
    """AltLoRA's update. With `turn` each factor trains for that many steps while the other is
    frozen, beginning with A; 0 trains both at every step, A first."""

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float | None = None  # of AltLoRA+'s second moment; None: no second moment
    damping: float = 1e-5
    relative: bool = False
    turn: int = 0
    twice: bool = False  # both turns within one step, each with its own gradient
    scale_grad: bool = True
    store_unaligned: bool = False

    def init(self, B: Tensor, A: Tensor, inner: Inner) -> tuple[Moments, Moments]:
        wide = torch.promote_types(B.dtype, torch.float32)

        def moments(own: Tensor, other: Tensor) -> Moments:
            state = {"exp_avg": torch.zeros_like(own, dtype=wide)}
            if self.eps is not None:
                state["exp_avg_sq"] = torch.zeros_like(own, dtype=wide)
            return state | {"other": torch.zeros_like(other, dtype=wide)}  # at the last step

        return moments(B, A), moments(A, B)

    @property
    def passes(self) -> int:
        return 2 if self.twice else 1

    def rests(self, step: int) -> str:
        if not self.turn:
            return ""
        return "B" if step // self.turn % 2 == 0 else "A"

    def move(self, B: Factor, A: Factor, s: Tensor, inner: Inner) -> None:
        if not A.rests:
            self.move_one(A, B.value, s)
        if not B.rests:
            self.move_one(B, A.value, s)  # preconditioned with the new A

    def move_one(self, factor: Factor, F: Stacks, s: Tensor) -> None:
        """Update A with B = F fixed, or B with A = F fixed."""
        b1, b2 = self.betas
        g, M = factor.grad, factor.state("exp_avg")
        old = factor.state("other")._replace(tall=F.tall)
        scale = s if self.scale_grad else torch.ones_like(s)
        P, to_h = projection(F, scale, self.damping, self.relative)
        carry = b1 * carrier(P, F, old)
        size = 1 / factor.correction(b1)
        if self.eps is None and not self.store_unaligned:  # h itself is not needed
            step = mixed((carry, M), ((1 - b1) * to_h, g))
            factor.keep(exp_avg=step, other=F)
            factor.move(step, size, decay="after")
            return
        h, over = mixed((to_h, g)), None
        step = mixed((carry, M))
        torch._foreach_add_(step.tensors, h.tensors, alpha=1 - b1)
        if self.eps is not None:
            V = factor.state("exp_avg_sq")
            torch._foreach_mul_(V.tensors, b2)
            torch._foreach_addcmul_(V.tensors, h.tensors, h.tensors, 1 - b2)
            factor.keep(exp_avg_sq=V)
            over = list(torch._foreach_sqrt(V.tensors))
            torch._foreach_add_(over, self.eps)
        if self.store_unaligned:
            torch._foreach_lerp_(M.tensors, h.tensors, 1 - b1)
        factor.keep(exp_avg=M if self.store_unaligned else step, other=F)
        factor.move(step, size, over, decay="after")


@dataclass(frozen=True)
class AltLoRA(Update):
    """The full gradient projected on one factor at a time, with momentum that follows them."""

    plus: bool = False
    """AltLoRA+: divide by the root of a second moment, as Adam does. Learning rates are then
    near Adam's (so is the default), and the split of B A matters."""

    schedule: Literal["joint", "alternate", "two_backward"] = "joint"
    """joint: both factors at every step, A first (code). alternate: in turns; the other factor
    is frozen and needs no gradient. two_backward: A, then B with a gradient at the new A, within
    one step (paper); only in loops that call step(closure)."""

    turn: Annotated[int, Ge(1)] = 1
    """Steps each factor trains at a time under schedule=alternate. Code: 10."""

    damping: Annotated[float, Ge(0)] = 1e-5
    """d, added to B^T B and A A^T where they are inverted. Runs of the paper: 1e-5."""

    damping_mode: Literal["abs", "rel"] = "abs"
    """Damping as it is (code), or times the mean eigenvalue, which is safer where B is tiny: try
    rel with damping=1e-2 where AltLoRA+ stalls; rates of 1e-3 may then serve it."""

    scale_grad: bool = True
    """Divide by s^2, so that h is exactly the projection above; the code leaves it to the
    learning rate."""

    store_unaligned: bool = False
    """AltLoRA+ as in the code: store the momentum without transforming it to the new factors."""

    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of the momentum and, with `plus`, of the second moment. Runs: (0.9, 0.999)."""

    eps: Annotated[float, Gt(0)] = 1e-4
    """Added to the root of the second moment. Runs: 1e-4."""

    weight_decay: Annotated[float, Ge(0)] = 0.0
    """Decoupled weight decay, multiplied by the learning rate. Runs: 1e-5."""

    wants: ClassVar = "pairs"
    default_lr: ClassVar = {0.1: {"plus": False}, 3e-4: {"plus": True}}
    mission: ClassVar = True
    paper: ClassVar = Paper(
        "AltLoRA: Towards Better Gradient Approximation in Low-Rank Adaptation with "
        "Alternating Projections",
        "https://arxiv.org/abs/2505.12455",
    )

    def rule(self) -> Rule:
        turn = {"joint": 0, "alternate": self.turn, "two_backward": 1}[self.schedule]
        pair = Alternating(
            betas=self.betas,
            eps=self.eps if self.plus else None,
            damping=self.damping,
            relative=self.damping_mode == "rel",
            turn=turn,
            twice=self.schedule == "two_backward",
            scale_grad=self.scale_grad,
            store_unaligned=self.store_unaligned,
        )
        return Rule(Adam(self.betas), pair=pair, weight_decay=self.weight_decay)

    def cost(self, m: int, n: int) -> Cost:
        """The state of one m x n factor: its moments and the copy that its partner keeps of it."""
        return Cost(state=(3 if self.plus else 2) * m * n)
