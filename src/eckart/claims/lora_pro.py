"""LoRA-Pro: fine-tune a small code model on prose, factor updates matched to the full gradient.

Source: Z. Wang et al., "LoRA-Pro: Are Low-Rank Adapters Properly Optimized?", ICLR 2025,
tables 1 and 2: far better than LoRA at the same rank, and close to full fine-tuning.

All adapters have rank 4, where LoRA is worse than training the same matrices in full. LoRA-Pro
keeps moments of the full matrices, so its state is as large as full fine-tuning's; AltLoRA+ and
LoRA-Pro with factored moments need LoRA's state only.
"""

from eckart.claims import UNTOUCHED, Arm, Claim, Statement, lower
from eckart.methods import AltLoRA, Dense, LoRA, LoRAPro
from eckart.recipe import Recipe


def lora(lr_ratio: float = 1.0) -> LoRA:
    return LoRA(rank=4, alpha=8, lr_ratio=lr_ratio)


CLAIM = Claim(
    says="at equal rank LoRA-Pro is better than LoRA, and at least halves what LoRA lacks to "
    "full fine-tuning of the same matrices",
    arms=(
        UNTOUCHED,
        Arm("full", Recipe(Dense(targets=("linear",))), lr=3e-3),
        Arm("LoRA", Recipe(lora()), lr=1e-2),
        Arm("LoRA-Pro", Recipe(lora(), LoRAPro()), lr=3e-3),
        Arm("LoRA+", Recipe(lora(lr_ratio=16.0)), lr=3e-3),
        Arm("AltLoRA+", Recipe(lora(), AltLoRA(plus=True)), lr=3e-3, full=True),
        Arm(
            "LoRA-Pro, factored moments",
            Recipe(lora(), LoRAPro(moment_space="factored")),
            lr=3e-3,
            full=True,
        ),
    ),
    control=lower("full", than="untouched", by=0.1),
    statements=(
        lower("LoRA-Pro", than="LoRA"),
        Statement(
            "LoRA-Pro at least halves the distance from LoRA to full",
            lambda r: (
                0.5 * (r["LoRA"]["loss"] - r["full"]["loss"])
                - (r["LoRA-Pro"]["loss"] - r["full"]["loss"])
            ),
        ),
        lower("LoRA-Pro", than="LoRA+"),
        lower("LoRA-Pro", than="AltLoRA+"),
        lower("LoRA-Pro", than="LoRA-Pro, factored moments"),
    ),
    unseen="mathematics, code and dialogue at 7 billion parameters, GLUE with T5, time per step",
)
