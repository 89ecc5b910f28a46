"""LoRA-RITE: fine-tune a small code model on prose, preconditioning invariant to factor scales.

Source: J.-N. Yen et al., "LoRA Done RITE: Robust Invariant Transformation Equilibration for
LoRA Optimization", arXiv 2410.20625, tables 2 and 3: better than Adam, LoRA+ and ScaledAdam on
the same factors.
"""

from eckart.claims import UNTOUCHED, Arm, Claim, lower
from eckart.methods import LoRA, LoRARITE, Riemannian
from eckart.recipe import Recipe


def lora(lr_ratio: float = 1.0) -> LoRA:
    return LoRA(rank=8, alpha=16, lr_ratio=lr_ratio)


CLAIM = Claim(
    says="on the same factors LoRA-RITE is better than Adam, than LoRA+ and than Riemannian "
    "preconditioning",
    arms=(
        UNTOUCHED,
        Arm("LoRA", Recipe(lora()), lr=1e-2),
        Arm("LoRA+", Recipe(lora(lr_ratio=16.0)), lr=3e-3),
        Arm("Riemannian", Recipe(lora(), Riemannian()), lr=3e-3),
        Arm("LoRA-RITE", Recipe(lora(), LoRARITE()), lr=3e-3),
    ),
    control=lower("LoRA", than="untouched", by=0.1),
    statements=(
        lower("LoRA-RITE", than="LoRA"),
        lower("LoRA-RITE", than="LoRA+"),
        lower("LoRA-RITE", than="Riemannian"),
    ),
    unseen="Gemma and mT5 at 2 to 7 billion parameters, super-natural instructions, GSM8K",
)
