"""ReLoRA: continue training a small code model on prose with a sequence of merged adapters.

Source: V. Lialin et al., "ReLoRA: High-Rank Training Through Low-Rank Updates", ICLR 2024,
Table 2: far better than one adapter of the same rank, and close to training all weights, after
a phase of full training.

The initial model was pretrained on code. Embedding, last norm and head are trained in full in both
adapters' arms, as ReLoRA does; norms inside the blocks only in ReLoRA's.
"""

from eckart.claims import UNTOUCHED, Arm, Claim, lower, recovers
from eckart.methods import Dense, LoRA, ReLoRA
from eckart.recipe import Recipe

WHOLE = ("model.embed_tokens", "model.norm", "lm_head")

CLAIM = Claim(
    says="adapters of rank 4 one after another are better than one of that rank, and have nine "
    "tenths of what training all weights gains",
    arms=(
        UNTOUCHED,
        Arm("full", Recipe(Dense()), lr=3e-3),
        Arm("LoRA", Recipe(LoRA(rank=4, alpha=8)), lr=3e-3, also_train=WHOLE),
        Arm("ReLoRA", Recipe(ReLoRA(rank=4, alpha=8, every=50, rewarm=5)), lr=3e-3),
    ),
    control=lower("full", than="untouched", by=0.1),
    statements=(
        lower("ReLoRA", than="LoRA"),
        recovers("ReLoRA", 0.9, of="full", start="untouched"),
    ),
    unseen="pretraining of 60 M to 1.3 B parameters, speed and memory on a card",
)
