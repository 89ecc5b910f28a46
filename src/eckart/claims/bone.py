"""Bone: fine-tune a small code model on prose with one trained block repeated over each matrix.

Source: J. Kang, "Bone: Block Affine Transformation as Parameter Efficient Fine-tuning Methods
for Large Language Models", 2024, abstract: above PiSSA on mathematics, and faster from the
first steps on, without an elaborate start. Its first versions mean bat, later ones tile.

LoRA of rank 9 trains 2 % more numbers than blocks of 16, rank 35 0.6 % fewer than blocks of 64.
Tile is LoRA with a frozen A that folds x; "frozen random A" has the same rank and number of
parameters with random orthonormal rows, and shows whether the folding matters.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from eckart.claims import UNTOUCHED, Arm, Claim, lower
from eckart.linear import LowRank, Site
from eckart.methods import Bone, LoRA
from eckart.recipe import Recipe

EARLY = 25


@dataclass(frozen=True)
class FrozenA(LoRA):
    """LoRA with a frozen A of random orthogonal rows, scaled to the norm of Bone's fold."""

    offers: ClassVar = ()

    def build_one(self, site: Site) -> Mapping[str, nn.Module]:
        (m, n), r = site.shape, min(self.rank, *site.shape)
        rows = torch.linalg.qr(torch.randn(n, r, generator=site.generator))[0].mT
        A = math.sqrt(n / r) * rows  # [r, n]; a fold has n / r ones in each row
        return {"factors": LowRank(torch.zeros(m, r), A.contiguous(), trained=("B",))}


def arm(name: str, recipe: Recipe, lr: float, full: bool = False) -> Arm:
    return Arm(name, recipe, lr=lr, loss_at=(EARLY,), full=full)


def lora(rank: int, init: str = "kaiming") -> Recipe:
    return Recipe(LoRA(rank=rank, alpha=2 * rank, init=init))  # type: ignore[arg-type]


CLAIM = Claim(
    says="at equal numbers of trained parameters Bone is better than LoRA, with its usual and "
    "with its principal start, after a few steps and at the end",
    arms=(
        UNTOUCHED,
        arm("LoRA", lora(9), lr=1e-2),
        arm("LoRA, principal start", lora(9, "pissa"), lr=3e-3),
        arm("tile", Recipe(Bone(rank=16)), lr=1e-2),
        arm("bat", Recipe(Bone(rank=16, mode="bat")), lr=1e-2),
        arm("frozen random A", Recipe(FrozenA(rank=16)), lr=1e-2),
        arm("LoRA, rank 35", lora(35), lr=1e-2, full=True),
        arm("tile, r = 64", Recipe(Bone(rank=64)), lr=3e-3, full=True),
        arm("bat, r = 64", Recipe(Bone(rank=64, mode="bat")), lr=3e-3, full=True),
    ),
    control=lower("LoRA", than="untouched", by=0.1),
    statements=(
        lower("bat", than="LoRA, principal start", quantity=f"loss@{EARLY}"),
        lower("bat", than="LoRA, principal start"),
        lower("bat", than="LoRA"),
        lower("tile", than="LoRA"),
        lower("tile", than="frozen random A"),
        lower("bat, r = 64", than="LoRA, rank 35"),
        lower("tile, r = 64", than="LoRA, rank 35"),
    ),
    unseen="mathematics at 7 billion parameters, RWKV, memory and time at that size",
)
