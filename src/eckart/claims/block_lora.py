"""Block-LoRA: fine-tune a small code model on prose, four blocks of B sharing one A.

Source: "One Head Eight Arms: Block Matrix based Low Rank Adaptation for CLIP-based Few-Shot
Learning", 2025, abstract: the accuracy of LoRA of the nominal rank with fewer trained
parameters.

All four blocks of B get the same gradient and stay equal, so Block-LoRA of nominal rank 8 has
updates of rank 2. LoRA of rank 2 is therefore the baseline to beat, as it is and with B's
learning rate four times A's, which is what four equal blocks amount to. "As good" means: at most
0.02 nats above, about a twentieth of the gain of fine-tuning.
"""

from eckart.claims import UNTOUCHED, Arm, Claim, lower, matches
from eckart.methods import BlockLoRA, LoRA
from eckart.recipe import Recipe

MARGIN = 0.02


def lora(rank: int, lr_ratio: float = 1.0) -> Recipe:
    return Recipe(LoRA(rank=rank, alpha=2 * rank, lr_ratio=lr_ratio))


CLAIM = Claim(
    says="Block-LoRA of nominal rank 8 is as good as LoRA of rank 8, and better than LoRA of "
    "rank 2, with which it shares the rank of its update",
    arms=(
        UNTOUCHED,
        Arm("LoRA, rank 8", lora(8), lr=1e-2),
        Arm("LoRA, rank 2", lora(2), lr=1e-2),
        Arm("LoRA, rank 2, ratio 4", lora(2, lr_ratio=4.0), lr=1e-2),
        Arm("Block-LoRA", Recipe(BlockLoRA(rank=8, blocks=4, alpha=16, form="arms")), lr=1e-2),
        Arm(
            "Block-LoRA, one arm",
            Recipe(BlockLoRA(rank=8, blocks=4, alpha=16)),
            lr=1e-2,
            full=True,
        ),
        Arm(
            "other partition, row",
            Recipe(BlockLoRA(rank=8, blocks=4, alpha=16, form="row")),
            lr=1e-2,
            full=True,
        ),
        Arm(
            "other partition, grid",
            Recipe(BlockLoRA(rank=8, blocks=4, alpha=16, form="grid")),
            lr=1e-2,
            full=True,
        ),
    ),
    control=lower("LoRA, rank 8", than="untouched", by=0.1),
    statements=(
        matches("Block-LoRA", of="LoRA, rank 8", within=MARGIN),
        lower("Block-LoRA", than="LoRA, rank 2"),
        lower("Block-LoRA", than="LoRA, rank 2, ratio 4"),
    ),
    unseen="few-shot accuracies of CLIP on eleven sets of images, memory of ImageNet on one "
    "card, the bound on generalisation",
)
