"""PiSSA: LoRA initialized from the principal singular vectors learns faster early on.

Source: F. Meng et al., "PiSSA: Principal Singular Values and Singular Vectors Adaptation of
Large Language Models", 2024, Fig. 2 and Table 1: a lower loss from the first steps on, and at
the end. In eckart this is LoRA's `init`.
"""

from eckart.claims import UNTOUCHED, Arm, Claim, lower
from eckart.methods import LoRA
from eckart.recipe import Recipe

EARLY = 25

CLAIM = Claim(
    says="starting LoRA from the principal singular vectors gives a lower loss early and late, "
    "each start with its own best learning rate",
    arms=(
        UNTOUCHED,
        Arm("kaiming", Recipe(LoRA(rank=8, alpha=16)), lr=1e-2, loss_at=(EARLY,)),
        Arm("pissa start", Recipe(LoRA(rank=8, alpha=16, init="pissa")), lr=3e-3, loss_at=(EARLY,)),
    ),
    control=lower("kaiming", than="untouched", by=0.1),
    statements=(
        lower("pissa start", than="kaiming", quantity=f"loss@{EARLY}"),
        lower("pissa start", than="kaiming"),
    ),
    unseen="the gap at billions of parameters and after thousands of steps; quantised bases",
)
