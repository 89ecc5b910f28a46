"""DoRA: fine-tune a small code model on prose, magnitudes and directions trained separately.

Source: S.-Y. Liu et al., "DoRA: Weight-Decomposed Low-Rank Adaptation", ICML 2024, Table 1 and
Fig. 5: better than LoRA of the same rank, and as good at half the rank.
"""

from eckart.claims import UNTOUCHED, Arm, Claim, lower, matches
from eckart.methods import DoRA, LoRA
from eckart.recipe import Recipe

CLAIM = Claim(
    says="DoRA is better than LoRA of the same rank, and at half the rank as good",
    arms=(
        UNTOUCHED,
        Arm("LoRA", Recipe(LoRA(rank=8, alpha=16)), lr=1e-2),
        Arm("DoRA", Recipe(DoRA(rank=8, alpha=16)), lr=1e-2),
        Arm("DoRA, rank 4", Recipe(DoRA(rank=4, alpha=8)), lr=1e-2),
    ),
    control=lower("LoRA", than="untouched", by=0.1),
    statements=(
        lower("DoRA", than="LoRA"),
        matches("DoRA, rank 4", of="LoRA", within=0.02),
    ),
    unseen="commonsense questions at 7 to 13 billion parameters, instructions on images and video",
)
