"""LISA: all parameters are trained, but only a few blocks of the model at a time.

    every K steps:  draw gamma of the N blocks, uniformly, without replacement
    at each step:   AdamW on embeddings, head, last norm and the drawn blocks; the others are
                    frozen: no gradient, no moments, no decay

The memory is that of the drawn blocks and of everything that is in no block. Take it to
fine-tune everything at about LoRA's memory, in runs of many draws; with a large vocabulary
most of that goes to embeddings and head, which train_rest=false freezes. Take LoRA for short
runs: after 200 steps, two of six blocks at a time, the loss in claims/lisa.py is 1.52 nats, LoRA's
of rank 8 1.48, and 1.44 where all is trained. Take GaLore or Fira to move all blocks at every
step, and where the model has no numbered list of blocks (`block_paths` may name others).

Source: R. Pan et al., "LISA: Layerwise Importance Sampling for Memory-Efficient Large
Language Model Fine-Tuning", NeurIPS 2024, Alg. 1; moments are reset in each period as in its
experiments. We differ from its code in two points: it keeps the state of
all blocks it has ever drawn, so that the memory grows to Adam's; and it draws from a global
generator, while ours is a function of seed and period, the same on every process and after
a resume.
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from annotated_types import Ge, Gt

from eckart.optim import Adam, Blocks, EightBit, Rule
from eckart.recipe.method import Cost, Paper, Update


@dataclass(frozen=True)
class LISA(Update):
    """AdamW on a few blocks, drawn again every K steps, and on everything outside the blocks."""

    blocks: Annotated[int, Ge(0)] = 2
    """gamma, blocks that train at a time. Paper: 2, sometimes 4."""

    every: Annotated[int, Ge(1)] = 20
    """K, steps between two draws. Paper: 3 to 80; code: 20."""

    moments: Literal["reset", "carry", "keep"] = "reset"
    """A block's moments: reset at each draw (paper), kept while the block is drawn again, or
    always kept (memory grows to that of Adam)."""

    reset_rest: bool = False
    """Also reset the moments of embeddings, head and last norm at each draw."""

    train_rest: bool = True
    """Train what is in no block: embeddings, head, last norm. Paper: yes."""

    once: bool = False
    """Keep the first draw for the whole run."""

    block_paths: tuple[str, ...] = ()
    """The modules that are blocks; by default the model's longest module list."""

    block_weights: tuple[float, ...] = ()
    """The blocks' relative probabilities, in any unit. Paper: all equal."""

    inner: Literal["adam", "adam8bit"] = "adam"
    """The rule of the parameters that train: Adam, or Adam with moments in 8 bits (32 where a
    tensor has fewer than 4096 elements)."""

    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of the first and of the second moment. Paper: Adam's."""

    eps: Annotated[float, Gt(0)] = 1e-8
    """Added to the root of the second moment."""

    weight_decay: Annotated[float, Ge(0)] = 0.0
    """Decoupled weight decay of what trains at a step, multiplied by the learning rate."""

    state_dtype: Literal["param", "float32"] = "param"
    """The dtype of the moments. Code: the parameter's."""

    rounding: Literal["nearest", "stochastic"] = "nearest"
    """How updated bf16 weights are rounded: to nearest, or stochastically, so that updates below
    bf16's resolution count on average."""

    wants: ClassVar = "matrices"
    default_lr: ClassVar = 5e-5
    scratch_lr: ClassVar = 1e-3
    mission: ClassVar = True
    paper: ClassVar = Paper(
        "LISA: Layerwise Importance Sampling for Memory-Efficient Large Language Model Fine-Tuning",
        "https://arxiv.org/abs/2403.17919",
        "NeurIPS 2024",
    )

    def rule(self) -> Rule:
        adam = Adam(self.betas, self.eps, state_dtype=self.state_dtype)
        return Rule(
            EightBit(adam) if self.inner == "adam8bit" else adam,
            blocks=Blocks(
                count=self.blocks,
                every=self.every,
                moments=self.moments,
                reset_rest=self.reset_rest,
                train_rest=self.train_rest,
                once=self.once,
                paths=self.block_paths,
                weights=self.block_weights,
            ),
            weight_decay=self.weight_decay,
            rounding=self.rounding,
        )

    def cost(self, m: int, n: int) -> Cost:
        """The state while the matrix's block trains; none at other times."""
        return Cost(state=self.rule().state_elements(m, n))
