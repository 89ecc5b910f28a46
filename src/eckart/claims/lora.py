"""LoRA: fine-tune a small code model on prose with low-rank factors.

Source: E. Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", 2021, abstract
and sections 7.1 and 7.2: quality on a par with full fine-tuning at a small rank.

Full fine-tuning trains the same matrices in full: embedding, norms and head are frozen in all
arms.
"""

from eckart.claims import UNTOUCHED, Arm, Claim, lower, recovers
from eckart.methods import Dense, LoRA
from eckart.recipe import Recipe

CLAIM = Claim(
    says="at rank 8, LoRA recovers nearly all that training the same matrices whole gains",
    arms=(
        UNTOUCHED,
        Arm("full", Recipe(Dense(targets=("linear",))), lr=3e-3),
        Arm("rank 1", Recipe(LoRA(rank=1, alpha=2)), lr=1e-2),
        Arm("rank 8", Recipe(LoRA(rank=8, alpha=16)), lr=1e-2),
        Arm("rank 2", Recipe(LoRA(rank=2, alpha=4)), lr=1e-2, full=True),
        Arm("rank 32", Recipe(LoRA(rank=32, alpha=64)), lr=1e-2, full=True),
    ),
    control=lower("full", than="untouched", by=0.1),
    statements=(
        recovers("rank 8", 0.9, of="full", start="untouched"),
        lower("rank 8", than="rank 1"),
    ),
    unseen="parity at 175 billion parameters, inference latency, what is forgotten",
)
