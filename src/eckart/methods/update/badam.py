"""BAdam: Adam on one block of the model at a time, all blocks in turn.

    every K steps:  the next block, in order or in an order shuffled again in each round
    at each step:   AdamW on that block, whose moments started at zero; all else is frozen

Block coordinate descent: at any time there are gradients and moments of one layer only. Take it
to fine-tune everything in the least memory, in runs of many rounds: a block trains in one step
of N. Take LoRA or LISA for short runs: after 200 steps on six blocks the loss in claims/badam.py
is 1.63 nats, LoRA's of rank 8 1.48, and 1.44 where all is trained. LISA trains several randomly
drawn layers, and embeddings and head; here those and the last norm are frozen unless `train_rest`
is set, so that by default it is not suited to pretraining.

Source: Q. Luo et al., "BAdam: A Memory Efficient Full Parameter Optimization Method for Large
Language Models", NeurIPS 2024, Alg. 1, and its code. We differ from it in three points: its
first period is a step short; embeddings and head, if trained, are trained at every step (there
they are blocks of their own); and the shuffled order is a function of seed and round, the same
on every process and after a resume.
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from annotated_types import Ge, Gt

from eckart.optim import Adam, Blocks, Rule
from eckart.recipe.method import Cost, Paper, Update


@dataclass(frozen=True)
class BAdam(Update):
    """AdamW on one block at a time, each for K steps."""

    every: Annotated[int, Ge(1)] = 100
    """K, steps before the next block. Paper: 100; code: 50."""

    order: Literal["shuffled", "ascending", "descending"] = "shuffled"
    """The order of the blocks in each round. Paper: shuffled; code: descending."""

    train_rest: bool = False
    """Also train what is in no block, at every step: embeddings, head, last norm. Code: no."""

    block_paths: tuple[str, ...] = ()
    """The modules that are blocks; by default the model's longest module list."""

    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of the first and of the second moment. Paper: Adam's."""

    eps: Annotated[float, Gt(0)] = 1e-8
    """Added to the root of the second moment."""

    weight_decay: Annotated[float, Ge(0)] = 0.0
    """Decoupled weight decay of what trains at a step, multiplied by the learning rate."""

    wants: ClassVar = "matrices"
    default_lr: ClassVar = 1e-5
    scratch_lr: ClassVar = 1e-3
    mission: ClassVar = False
    paper: ClassVar = Paper(
        "BAdam: A Memory Efficient Full Parameter Optimization Method for Large Language Models",
        "https://arxiv.org/abs/2404.02827",
        "NeurIPS 2024",
    )

    def rule(self) -> Rule:
        return Rule(
            Adam(self.betas, self.eps),
            blocks=Blocks(
                count=1,
                every=self.every,
                train_rest=self.train_rest,
                paths=self.block_paths,
                order=self.order,
            ),
            weight_decay=self.weight_decay,
        )

    def cost(self, m: int, n: int) -> Cost:
        """The state while the matrix's block trains; none at other times."""
        return Cost(state=2 * m * n)
