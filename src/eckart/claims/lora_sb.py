"""LoRA-SB: fine-tune a small code model on prose with r x r cores between frozen bases.

Source: K. Ponkshe et al., "Initialization using Update Approximation is a Silver Bullet for
Extremely Efficient Low-Rank Fine-Tuning", 2024, abstract: better than LoRA with 27 to 90
times fewer trained parameters, and far better than LoRA-XS, whose architecture it shares.

All cores are 16 x 16, 3,584 parameters over 14 matrices; LoRA of rank 1 trains 5,120. The first
full update gives both the bases and the initial core: "core at zero" (with --full) takes only the
bases and shows whether the initial core matters. Random bases are the weakest baseline.
"""

from typing import Any

from eckart.claims import UNTOUCHED, Arm, Claim, lower
from eckart.methods import LoRA, LoRASB
from eckart.recipe import Recipe


def core(**fields: Any) -> Recipe:
    return Recipe(LoRASB(rank=16, **fields))


CLAIM = Claim(
    says="a core between the directions of the first full update is better than one between "
    "random directions or those of the weights, and than LoRA of rank 1 with more numbers",
    arms=(
        UNTOUCHED,
        Arm("LoRA, rank 1", Recipe(LoRA(rank=1, alpha=2)), lr=1e-2),
        Arm("LoRA-SB", core(), lr=3e-2),
        Arm("random", core(init="random"), lr=3e-2),
        Arm("LoRA-XS", core(init="xs"), lr=3e-2),
        Arm("directions of W", core(init="weight"), lr=3e-2),
        Arm("core at zero", core(core="zero"), lr=3e-2, full=True),
        Arm(
            "gradient without its sign, core at zero",
            core(init="raw", core="zero"),
            lr=3e-2,
            full=True,
        ),
    ),
    control=lower("LoRA, rank 1", than="untouched", by=0.1),
    statements=(
        lower("LoRA-SB", than="random"),
        lower("LoRA-SB", than="directions of W"),
        lower("LoRA-SB", than="LoRA-XS"),
        lower("LoRA-SB", than="LoRA, rank 1"),
        lower("LoRA-SB", than="core at zero"),
        lower("LoRA-SB", than="gradient without its sign, core at zero"),
    ),
    unseen="mathematics and commonsense at 7 to 9 billion parameters, GLUE, ranks of 24 to 96",
)
