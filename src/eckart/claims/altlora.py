"""AltLoRA: fine-tune a small code model on prose with alternating projections of the gradient.

Source: X. Yu et al., "AltLoRA: Towards Better Gradient Approximation in Low-Rank Adaptation
with Alternating Projections", arXiv 2505.12455, abstract: better than LoRA and close to full
fine-tuning at LoRA's memory, and the same whichever way B A is split.

Model, data and baselines are those of claims/lora_pro.py. Invariance to the split is
tested from a nonzero initialization, W's principal part (which is subtracted), once as it is and
once with A multiplied and B divided by ten. The product is the same, so any difference is due to
the split. Each arm has its own learning rate.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from eckart.claims import UNTOUCHED, Arm, Claim, lower, matches
from eckart.claims.allora import PlainSGD
from eckart.linear import LowRank, Site
from eckart.methods import AltLoRA, Dense, LoRA, LoRAPro
from eckart.recipe import Recipe, Update

TILT = 10.0


@dataclass(frozen=True)
class Tilted(LoRA):
    """LoRA initialized from W's principal part, with A multiplied and B divided by `tilt`."""

    tilt: float = TILT
    offers: ClassVar = ("pairs",)

    def build_one(self, site: Site) -> Mapping[str, nn.Module]:
        term = super().build_one(site)["lora"]
        assert isinstance(term, LowRank)
        with torch.no_grad():
            for B, A in ((term.B, term.A), (term.B0, term.A0)):
                B.div_(self.tilt)
                A.mul_(self.tilt)
        return {"tilted": term}


def pair_of(rank: int, update: Update | None = None) -> Recipe:
    return Recipe(LoRA(rank=rank, alpha=2 * rank), update)


def tilted(tilt: float, update: Update) -> Recipe:
    return Recipe(Tilted(rank=4, alpha=8, init="pissa", tilt=tilt), update)


PLUS = AltLoRA(plus=True)
RANKS = (2, 8)

CLAIM = Claim(
    says="at equal rank AltLoRA is better than LoRA, with and without a second moment, and does "
    "not mind how the product is split",
    arms=(
        UNTOUCHED,
        Arm("full", Recipe(Dense(targets=("linear",))), lr=3e-3),
        Arm("LoRA", pair_of(4), lr=1e-2),
        Arm("AltLoRA+", pair_of(4, PLUS), lr=3e-3),
        Arm("AltLoRA", pair_of(4, AltLoRA()), lr=0.3),
        Arm("AltLoRA, even", tilted(1.0, AltLoRA()), lr=0.3),
        Arm("AltLoRA, tilted", tilted(TILT, AltLoRA()), lr=0.3),
        Arm("SGD, even", tilted(1.0, PlainSGD()), lr=0.1),
        Arm("SGD, tilted", tilted(TILT, PlainSGD()), lr=0.01),
        Arm("LoRA-Pro", pair_of(4, LoRAPro()), lr=3e-3, full=True),
        *(Arm(f"LoRA, rank {r}", pair_of(r), lr=1e-2, full=True) for r in RANKS),
        *(Arm(f"AltLoRA+, rank {r}", pair_of(r, PLUS), lr=3e-3, full=True) for r in RANKS),
        Arm(
            "AltLoRA+, in turns",
            pair_of(4, AltLoRA(plus=True, schedule="alternate")),
            lr=3e-3,
            full=True,
        ),
    ),
    control=lower("full", than="untouched", by=0.1),
    statements=(
        lower("AltLoRA+", than="LoRA"),
        lower("AltLoRA", than="LoRA"),
        matches("AltLoRA, tilted", of="AltLoRA, even", within=0.01),
        lower("SGD, even", than="SGD, tilted"),
        matches("AltLoRA+", of="LoRA-Pro", within=0.01),
        *(lower(f"AltLoRA+, rank {r}", than=f"LoRA, rank {r}") for r in RANKS),
        lower("AltLoRA+", than="AltLoRA+, in turns"),
    ),
    unseen="mathematics, code and dialogue at 8 billion parameters, where a step costs as much as "
    "LoRA's; the guarantee of convergence",
)
