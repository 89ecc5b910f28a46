"""LISA: fine-tune a small code model on prose, two of its six blocks at a time.

Source: R. Pan et al., "LISA: Layerwise Importance Sampling for Memory-Efficient Large
Language Model Fine-Tuning", NeurIPS 2024, abstract and tables 2 and 3: better than LoRA in
LoRA's memory, and as good as full fine-tuning or better.

"full" trains all parameters, embedding and head included, as LISA does; "rest" trains only these
two and shows what the sampled blocks add. LoRA's rank is a common choice, as in the paper; the
optimizer state of each arm is reported and compared. "On a level" means: at most 2 % above in
loss.
"""

from typing import Any

from eckart.claims import UNTOUCHED, Arm, Claim, Statement, Task, lower, near
from eckart.methods import LISA, Dense, LoRA
from eckart.recipe import Recipe

SIX_BLOCKS = {
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
}


def lisa(**fields: Any) -> Recipe:
    return Recipe(Dense(), LISA(blocks=2, every=10, **fields))


CLAIM = Claim(
    says="training two of six blocks at a time is better than LoRA, on a level with training "
    "all of them, and needs at most half of Adam's state",
    task=Task(shape=SIX_BLOCKS),
    full=Task(shape=SIX_BLOCKS, steps=400),
    arms=(
        UNTOUCHED,
        Arm("full", Recipe(Dense()), lr=3e-3),
        Arm("LISA", lisa(), lr=3e-3),
        Arm("rest", Recipe(Dense(targets=("embedding", "head"))), lr=1e-2),
        Arm("LoRA, rank 8", Recipe(LoRA(rank=8, alpha=16)), lr=1e-2),
        Arm("LoRA, rank 32", Recipe(LoRA(rank=32, alpha=64)), lr=1e-2, full=True),
        Arm("the first two that are drawn", lisa(once=True), lr=3e-3, full=True),
        Arm("LISA, moments kept", lisa(moments="keep"), lr=3e-3, full=True),
    ),
    control=lower("full", than="untouched", by=0.1),
    statements=(
        lower("LISA", than="LoRA, rank 8"),
        lower("LISA", than="rest"),
        near("LISA", of="full", share=0.02),
        Statement(
            "LISA's state is at most half of that of full",
            lambda r: 0.5 * r["full"]["state_bytes"] - r["LISA"]["state_bytes"],
            unit="bytes",
        ),
        lower("LISA", than="LoRA, rank 32"),
        lower("LISA", than="the first two that are drawn"),
    ),
    unseen="MT-Bench and mathematics at 7 to 70 billion parameters, better than full "
    "fine-tuning, memory where the vocabulary is large",
)
