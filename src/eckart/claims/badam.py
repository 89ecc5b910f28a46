"""BAdam: fine-tune a small code model on prose, one of its six blocks at a time.

Source: Q. Luo et al., "BAdam: A Memory Efficient Full Parameter Optimization Method for Large
Language Models", NeurIPS 2024, tables 2 to 4: better than LoRA, close to training everything
with Adam, at the state of a single block.

The model is that of claims/lisa.py. Embedding, head and last norm are frozen, as in the paper.
"""

from eckart.claims import UNTOUCHED, Arm, Claim, Statement, Task, lower, near
from eckart.claims.lisa import SIX_BLOCKS
from eckart.methods import BAdam, Dense, LoRA
from eckart.recipe import Recipe

CLAIM = Claim(
    says="training one of six blocks at a time is better than LoRA, comes within 2% of training "
    "all of them, and needs at most a quarter of Adam's state",
    task=Task(shape=SIX_BLOCKS),
    arms=(
        UNTOUCHED,
        Arm("full", Recipe(Dense()), lr=3e-3),
        Arm("LoRA, rank 8", Recipe(LoRA(rank=8, alpha=16)), lr=1e-2),
        Arm("BAdam", Recipe(Dense(), BAdam(every=10)), lr=3e-3),
    ),
    control=lower("full", than="untouched", by=0.1),
    statements=(
        lower("BAdam", than="LoRA, rank 8"),
        near("BAdam", of="full", share=0.02),
        Statement(
            "BAdam's state is at most a quarter of that of full",
            lambda r: 0.25 * r["full"]["state_bytes"] - r["BAdam"]["state_bytes"],
            unit="bytes",
        ),
    ),
    unseen="MT-Bench and mathematics at 7 to 70 billion parameters, time and memory on a card",
)
