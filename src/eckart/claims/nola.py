"""NOLA: fine-tune a small code model on prose with fewer parameters than LoRA of rank one.

Source: S. Koohpayegani et al., "NOLA: Compressing LoRA using Linear Combination of Random
Basis", ICLR 2024, abstract: on a par with LoRA below its smallest size, since the number of
trained parameters depends on neither the rank nor the width of the matrices.

The simple baseline "below rank one" is LoRA of rank 1 on some of the matrices: 2,048 parameters
on q, v and down, where NOLA has 2,044 on all. "On a par" means: at most 2 % above LoRA of rank 1
in loss, with as many parameters (5,124 and 5,120). To show that combining factors matters, NOLA is
compared with a random subspace of the full update of the same size: "entries" sets each entry of
an update to a random one of its parameters, up to a sign, which gives orthogonal directions.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from annotated_types import Ge
from torch import Tensor, nn

from eckart.claims import UNTOUCHED, Arm, Claim, Results, Statement, lower, near
from eckart.linear import Site, Term
from eckart.methods import NOLA, LoRA
from eckart.recipe import Recipe, Weights

FEW, MANY = 73, 183  # bases a side: 2,044 and 5,124 numbers over 14 matrices
SPREAD = 0.02  # nats, about a twentieth of the gain of fine-tuning


class Entries(Term):
    """An update whose entries are parameters c [k] up to a sign: c[which] * sign."""

    which: Tensor
    sign: Tensor

    def __init__(self, k: int, which: Tensor, sign: Tensor):
        super().__init__()
        self.c = nn.Parameter(torch.zeros(k))
        self.register_buffer("which", which)  # [m, n]
        self.register_buffer("sign", sign)  # [m, n]

    def forward(self, x: Tensor) -> Tensor:  # [*, t, n] -> [*, t, m]
        return self.mm(x, self.dense().mT)

    def dense(self) -> Tensor:  # [m, n]
        return self.c[self.which] * self.sign


@dataclass(frozen=True)
class Subspace(Weights):
    """Trains each matrix within a random subspace of k dimensions."""

    numbers: Annotated[int, Ge(1)] = 2 * FEW
    """k."""

    base: ClassVar = "frozen"
    offers: ClassVar = ()
    default_lr: ClassVar = 1e-2

    def build_one(self, site: Site) -> Mapping[str, nn.Module]:
        g = site.generator
        which = torch.randint(self.numbers, site.shape, generator=g)
        sign = torch.randint(2, site.shape, generator=g) * 2.0 - 1.0
        return {"entries": Entries(self.numbers, which, sign)}


def nola(rank: int, bases: int) -> Recipe:
    return Recipe(NOLA(rank=rank, bases=bases))


def rank_hardly_matters(r: Results) -> float:
    losses = [r[name]["loss"] for name in ("NOLA, r = 2", "NOLA", "NOLA, r = 32")]
    return SPREAD - (max(losses) - min(losses))


CLAIM = Claim(
    says="with fewer numbers than LoRA of rank 1 NOLA is better than LoRA on fewer matrices, "
    "with as many it is on a par with it, and its rank hardly matters",
    arms=(
        UNTOUCHED,
        Arm("LoRA, rank 1", Recipe(LoRA(rank=1, alpha=2)), lr=1e-2),
        Arm(
            "LoRA, rank 1, q v down",
            Recipe(LoRA(rank=1, alpha=2, targets=("attn.q", "attn.v", "mlp.down"))),
            lr=1e-2,
        ),
        Arm("NOLA", nola(8, FEW), lr=3e-2),
        Arm("NOLA, r = 2", nola(2, FEW), lr=3e-2),
        Arm("NOLA, r = 32", nola(32, FEW), lr=3e-2),
        Arm("NOLA, as many as LoRA", nola(8, MANY), lr=3e-2),
        Arm("entries", Recipe(Subspace()), lr=1e-3),
        Arm(
            "LoRA, rank 1, k o up",
            Recipe(LoRA(rank=1, alpha=2, targets=("attn.o", "attn.k", "mlp.up"))),
            lr=1e-2,
            full=True,
        ),
    ),
    control=lower("LoRA, rank 1", than="untouched", by=0.1),
    statements=(
        lower("NOLA", than="LoRA, rank 1, q v down"),
        near("NOLA, as many as LoRA", of="LoRA, rank 1", share=0.02),
        Statement("ranks 2, 8 and 32 are within 0.02 of one another", rank_hardly_matters),
        lower("NOLA", than="entries"),
        lower("NOLA", than="LoRA, rank 1, k o up"),
    ),
    unseen="twenty times smaller than rank 1 at 70 billion parameters, GPT-2, images, "
    "coefficients of 4 bits",
)
